#include <isobath/data/token_file.hpp>

#include <ATen/ATen.h>

#include <algorithm>
#include <isobath/core/digest.hpp>
#include <isobath/core/error.hpp>
#include <isobath/io/hdf5_file.hpp>
#include <isobath/io/safetensors_reader.hpp>
#include <optional>

namespace isobath::data {
namespace {

namespace fs = std::filesystem;

constexpr const char* kTokens = "tokens";
constexpr const char* kLengths = "lengths";
/// A sequence of one token predicts nothing.
constexpr int64_t kMinLength = 2;

/// What stands in a token file, before it is judged.
struct RawTokens {
  at::Tensor tokens;
  std::optional<at::Tensor> lengths;
  std::map<std::string, std::string>
      notes;  ///< tokenizer_sha256, vocab_size, bos_policy: those that are present
};

RawTokens read_safetensors(const fs::path& path) {
  const io::SafetensorsReader file(path);
  if (!file.tensors().contains(kTokens))
    fail<DataError>("{}: there is no tensor {}; expected int32 [sequences, length]", path.string(), kTokens);
  RawTokens raw{file.read(kTokens), {}, file.metadata()};
  if (file.tensors().contains(kLengths)) raw.lengths = file.read(kLengths);
  return raw;
}

RawTokens read_hdf5(const fs::path& path) {
  const io::Hdf5Reader file(path);
  if (!file.contains(kTokens))
    fail<DataError>("{}: there is no dataset {}; expected int32 [sequences, length]", path.string(), kTokens);
  RawTokens raw{file.read(kTokens), {}, {}};
  if (file.contains(kLengths)) raw.lengths = file.read(kLengths);
  for (const char* name : {"tokenizer_sha256", "vocab_size", "bos_policy"}) {
    if (!file.has_attribute("/", name)) continue;
    const io::Attribute value = file.attribute("/", name);
    if (const auto* text = std::get_if<std::string>(&value)) raw.notes[name] = *text;
    if (const auto* number = std::get_if<int64_t>(&value)) raw.notes[name] = std::to_string(*number);
  }
  return raw;
}

RawTokens read_any(const fs::path& path) {
  const std::string extension = path.extension().string();
  if (extension == ".safetensors") return read_safetensors(path);
  if (extension == ".h5" || extension == ".hdf5") return read_hdf5(path);
  fail<DataError>("{}: a token file ends in .safetensors, .h5 or .hdf5, not '{}'", path.string(), extension);
}

std::string note(const RawTokens& raw, const std::string& name) {
  const auto found = raw.notes.find(name);
  return found == raw.notes.end() ? std::string() : found->second;
}

void check_shape(const std::string& file, const RawTokens& raw, const TokenRequirements& requirements) {
  const at::Tensor& tokens = raw.tokens;
  if (tokens.scalar_type() != at::kInt || tokens.dim() != 2) {
    fail<DataError>("{}: tokens are {} of shape [{}]; expected Int (int32) of shape [sequences, length]",
                    file, c10::toString(tokens.scalar_type()), fmt::join(tokens.sizes(), ", "));
  }
  if (tokens.numel() == 0)
    fail<DataError>("{}: tokens of shape [{}] are empty", file, fmt::join(tokens.sizes(), ", "));
  if (tokens.size(0) < requirements.n_sequences) {
    fail<DataError>("{}: {} sequences are asked for, the file holds {}; ask for fewer or make a larger file",
                    file, requirements.n_sequences, tokens.size(0));
  }
  if (tokens.size(1) < requirements.length) {
    fail<DataError>(
        "{}: sequences of {} tokens are asked for, those of the file have {}; ask for shorter ones", file,
        requirements.length, tokens.size(1));
  }
  if (raw.lengths && (raw.lengths->scalar_type() != at::kInt || raw.lengths->dim() != 1 ||
                      raw.lengths->size(0) != tokens.size(0))) {
    fail<DataError>("{}: lengths are {} of shape [{}]; expected Int (int32) of shape [{}], one per sequence",
                    file, c10::toString(raw.lengths->scalar_type()), fmt::join(raw.lengths->sizes(), ", "),
                    tokens.size(0));
  }
}

void check_tokens(const std::string& file, const TokenSet& set, const RawTokens& raw, int64_t vocab_size) {
  const std::span<const int32_t> values(set.tokens.const_data_ptr<int32_t>(),
                                        static_cast<size_t>(set.tokens.numel()));
  const auto bad = std::find_if(values.begin(), values.end(),
                                [&](int32_t token) { return token < 0 || int64_t{token} >= vocab_size; });
  if (bad == values.end()) return;
  const int64_t index = bad - values.begin();
  const std::string vocabulary = note(raw, "vocab_size");
  const bool is_other_vocabulary = !vocabulary.empty() && vocabulary != std::to_string(vocab_size);
  fail<DataError>(
      "{}: sequence {}, position {}: token {} is outside the model's vocabulary [0, {}){}", file,
      index / set.length(), index % set.length(), *bad, vocab_size,
      is_other_vocabulary
          ? fmt::format("; the file was made for a vocabulary of {}: was another tokenizer used?", vocabulary)
          : std::string());
}

void check_lengths(const std::string& file, const at::Tensor& lengths, int64_t length) {
  const std::span<const int32_t> values(lengths.const_data_ptr<int32_t>(),
                                        static_cast<size_t>(lengths.numel()));
  const auto bad = std::find_if(values.begin(), values.end(),
                                [&](int32_t value) { return value < kMinLength || int64_t{value} > length; });
  if (bad != values.end())
    fail<DataError>("{}: sequence {}: its length {} is outside [{}, {}]", file, bad - values.begin(), *bad,
                    kMinLength, length);
}

}  // namespace

TokenSet read_tokens(const fs::path& path, const TokenRequirements& requirements) {
  const std::string file = path.string();
  const RawTokens raw = read_any(path);
  check_shape(file, raw, requirements);

  TokenSet set;
  set.tokenizer_sha256 = note(raw, "tokenizer_sha256");
  set.bos_policy = note(raw, "bos_policy");
  if (!set.tokenizer_sha256.empty() && !requirements.tokenizer_sha256.empty() &&
      set.tokenizer_sha256 != requirements.tokenizer_sha256) {
    fail<DataError>(
        "{} was made with another tokenizer: its tokenizer.json has SHA-256 {}, the model's has {}; "
        "tokenize again with the model's",
        file, set.tokenizer_sha256, requirements.tokenizer_sha256);
  }

  const int64_t n = requirements.n_sequences > 0 ? requirements.n_sequences : raw.tokens.size(0);
  const int64_t length = requirements.length > 0 ? requirements.length : raw.tokens.size(1);
  set.tokens = raw.tokens.slice(0, 0, n).slice(1, 0, length).contiguous();
  check_tokens(file, set, raw, requirements.vocab_size);
  if (raw.lengths) {
    const at::Tensor taken = raw.lengths->slice(0, 0, n).contiguous();
    check_lengths(file, taken, raw.tokens.size(1));
    set.lengths = taken.clamp_max(length);
  } else {
    set.lengths = at::full({n}, length, at::kInt);
  }
  check_lengths(file, set.lengths, length);
  set.digest = Digest().update(set.tokens).update(set.lengths).hex();
  return set;
}

TokenSet open_tokens(const fs::path& path, const TokenRequirements& requirements,
                     const comm::Communicator& comm) {
  constexpr int kRoot = 0;
  const bool is_root = comm.rank() == kRoot;
  TokenSet set;
  comm.agree_on([&] {
    if (is_root) set = read_tokens(path, requirements);
  });
  std::array<int64_t, 2> shape{};
  if (is_root) shape = {set.n_sequences(), set.length()};
  comm.broadcast(std::span<int64_t>(shape), kRoot);
  if (!is_root) {
    set.tokens = at::empty(shape, at::kInt);
    set.lengths = at::empty({shape[0]}, at::kInt);
  }
  comm.broadcast(set.tokens, kRoot);
  comm.broadcast(set.lengths, kRoot);
  comm.broadcast(set.tokenizer_sha256, kRoot);
  comm.broadcast(set.bos_policy, kRoot);
  comm.broadcast(set.digest, kRoot);
  return set;
}

}  // namespace isobath::data
