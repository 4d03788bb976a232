#include <ATen/ATen.h>
#include <fmt/ranges.h>

#include <cmath>
#include <isobath/core/error.hpp>
#include <isobath/model/checkpoint_reader.hpp>
#include <set>

namespace isobath::model {
namespace {

constexpr const char* kEmbedding = "model.embed_tokens.weight";
constexpr const char* kFinalNorm = "model.norm.weight";
constexpr const char* kLmHead = "lm_head.weight";

// What is converted to the compute dtype at once.
constexpr int64_t kPieceBytes = int64_t{16} << 20;

std::string block_prefix(int64_t block) {
  return fmt::format("model.layers.{}.", block);
}
std::string input_norm_of(int64_t block) {
  return block_prefix(block) + "input_layernorm.weight";
}
std::string post_attention_norm_of(int64_t block) {
  return block_prefix(block) + "post_attention_layernorm.weight";
}
std::string head_norm_of(int64_t block, Projection projection) {
  return block_prefix(block) +
         (projection == Projection::q ? "self_attn.q_norm.weight" : "self_attn.k_norm.weight");
}

/// Compares headers against what the config calls for; remembers the first problem of each kind, reports all
/// at once.
class Validation {
 public:
  explicit Validation(const io::ShardedReader& tensors) : tensors_(tensors) {}

  void expect(const std::string& name, const std::vector<int64_t>& shape) {
    if (!tensors_.contains(name)) {
      note(missing_, fmt::format("tensor {} is missing; expected shape [{}]", name, fmt::join(shape, ", ")));
      return;
    }
    const io::TensorInfo& info = tensors_.info(name);
    if (info.shape != shape) {
      note(mis_shaped_,
           fmt::format("shard {}: tensor {}: expected shape [{}], found [{}]", tensors_.shard_of(name), name,
                       fmt::join(shape, ", "), fmt::join(info.shape, ", ")));
    }
    if (info.dtype != at::kFloat && info.dtype != at::kHalf && info.dtype != at::kBFloat16) {
      note(ill_typed_, fmt::format("shard {}: tensor {}: expected dtype BFloat16, Half or Float, found {}",
                                   tensors_.shard_of(name), name, c10::toString(info.dtype)));
    }
  }

  void finish() const {
    std::vector<std::string> problems;
    for (const std::string& problem : {missing_, mis_shaped_, ill_typed_}) {
      if (!problem.empty()) problems.push_back(problem);
    }
    if (problems.empty()) return;
    fail<DataError>(
        "{} does not match its config.json: {}{}", tensors_.directory().string(), fmt::join(problems, "; "),
        n_problems_ > static_cast<int64_t>(problems.size()) ? fmt::format("; {} problems in all", n_problems_)
                                                            : "");
  }

 private:
  void note(std::string& first_of_kind, const std::string& problem) {
    ++n_problems_;
    if (first_of_kind.empty()) first_of_kind = problem;
  }

  const io::ShardedReader& tensors_;
  int64_t n_problems_ = 0;
  std::string missing_, mis_shaped_, ill_typed_;
};

void validate(const ModelConfig& config, const io::ShardedReader& tensors, bool accepts_packed) {
  Validation validation(tensors);
  validation.expect(kEmbedding, {config.vocab_size, config.d_model});
  validation.expect(kFinalNorm, {config.d_model});
  if (!config.tied_embeddings || tensors.contains(kLmHead)) {
    validation.expect(kLmHead, {config.vocab_size, config.d_model});
  }
  for (int64_t block = 0; block < config.n_blocks; ++block) {
    validation.expect(input_norm_of(block), {config.d_model});
    validation.expect(post_attention_norm_of(block), {config.d_model});
    if (config.head_norms)
      for (const Projection projection : {Projection::q, Projection::k})
        validation.expect(head_norm_of(block, projection), {config.head_dim});
    for (int p = 0; p < kProjections; ++p) {
      const auto projection = static_cast<Projection>(p);
      const std::string module = module_name(block, projection);
      const ModuleShape shape = module_shape(config, projection);
      const bool is_packed = accepts_packed && !tensors.contains(module + ".weight") &&
                             tensors.contains(module + ".weight_packed");
      if (!is_packed) validation.expect(module + ".weight", {shape.rows, shape.columns});
      if (shape.has_bias) validation.expect(module + ".bias", {shape.rows});
    }
  }
  validation.finish();
}

/// `converted` if all of it is finite. stored: dtype in the checkpoint.
at::Tensor finite(const io::ShardedReader& tensors, const std::string& name, at::Tensor converted,
                  at::ScalarType stored) {
  // Minimum and maximum carry a NaN through and show an infinity: one pass, where isfinite().all() takes
  // several.
  const auto [smallest, largest] = at::aminmax(converted);
  if (std::isfinite(smallest.item<double>()) && std::isfinite(largest.item<double>())) return converted;
  const auto n_bad = at::isfinite(converted).logical_not().sum().item<int64_t>();
  fail<NumericError>("{}: tensor {}: {} of {} values are not finite as {} (stored as {})",
                     tensors.directory().string(), name, n_bad, converted.numel(),
                     c10::toString(converted.scalar_type()), c10::toString(stored));
}

at::Tensor read_finite(const io::ShardedReader& tensors, const std::string& name, at::ScalarType dtype,
                       c10::Device device) {
  const io::TensorInfo& info = tensors.info(name);
  if (info.dtype == dtype && device.is_cpu()) return finite(tensors, name, tensors.read(name), dtype);
  // Piece by piece, so that a large matrix does not stand here twice.
  at::Tensor converted = at::empty(info.shape, at::TensorOptions(dtype).device(device));
  const int64_t n_rows = info.shape[0], row_bytes = std::max<int64_t>(1, (info.end - info.begin) / n_rows);
  const int64_t piece = std::max<int64_t>(1, kPieceBytes / row_bytes);
  for (int64_t row = 0; row < n_rows; row += piece) {
    const int64_t end = std::min(n_rows, row + piece);
    converted.slice(0, row, end).copy_(tensors.read_rows(name, row, end));
  }
  return finite(tensors, name, std::move(converted), info.dtype);
}

}  // namespace

CheckpointReader::CheckpointReader(const std::filesystem::path& directory, WeightDecoder decoder)
    : config_(read_model_config(directory)),
      tensors_(std::make_shared<const io::ShardedReader>(directory)),
      decoder_(std::move(decoder)) {
  validate(config_, *tensors_, static_cast<bool>(decoder_));
}

const ModelConfig& CheckpointReader::config() const {
  return config_;
}
const io::ShardedReader& CheckpointReader::tensors() const {
  return *tensors_;
}

BlockWeights CheckpointReader::read_block(int64_t block, at::ScalarType dtype, c10::Device device) const {
  ISOBATH_CHECK(0 <= block && block < config_.n_blocks, "block {} of {}", block, config_.n_blocks);
  BlockWeights weights;
  weights.input_norm = read_finite(*tensors_, input_norm_of(block), dtype, device);
  weights.post_attention_norm = read_finite(*tensors_, post_attention_norm_of(block), dtype, device);
  if (config_.head_norms) {
    weights.q_norm = read_finite(*tensors_, head_norm_of(block, Projection::q), dtype, device);
    weights.k_norm = read_finite(*tensors_, head_norm_of(block, Projection::k), dtype, device);
  }
  for (int p = 0; p < kProjections; ++p) {
    const auto projection = static_cast<Projection>(p);
    const std::string module = module_name(block, projection);
    const ModuleShape shape = module_shape(config_, projection);
    Linear& linear = weights[projection];
    if (tensors_->contains(module + ".weight")) {
      linear.weight = read_finite(*tensors_, module + ".weight", dtype, device);
    } else {
      const at::Tensor decoded = decoder_(*tensors_, module);
      const std::vector<int64_t> expected = {shape.rows, shape.columns};
      if (!decoded.defined() || decoded.sizes() != expected) {
        fail<DataError>(
            "{}: quantized module {}: expected a weight of shape [{}], its packed tensors give {}",
            tensors_->directory().string(), module, fmt::join(expected, ", "),
            decoded.defined() ? fmt::format("[{}]", fmt::join(decoded.sizes(), ", ")) : "none");
      }
      linear.weight = finite(*tensors_, module + ".weight_packed",
                             decoded.to(at::TensorOptions(dtype).device(device)), decoded.scalar_type());
    }
    if (shape.has_bias) linear.bias = read_finite(*tensors_, module + ".bias", dtype, device);
  }
  return weights;
}

at::Tensor CheckpointReader::read_embedding(at::ScalarType dtype, c10::Device device) const {
  return read_finite(*tensors_, kEmbedding, dtype, device);
}

HeadWeights CheckpointReader::read_head(at::ScalarType dtype, c10::Device device,
                                        const at::Tensor& embedding) const {
  HeadWeights head{.final_norm = read_finite(*tensors_, kFinalNorm, dtype, device), .lm_head = embedding};
  // A tied model whose checkpoint still stores an output projection is loaded with it, as transformers 5
  // does.
  if (tensors_->contains(kLmHead))
    head.lm_head = read_finite(*tensors_, kLmHead, dtype, device);
  else if (!embedding.defined())
    head.lm_head = read_embedding(dtype, device);
  return head;
}

std::vector<std::string> CheckpointReader::other_tensors_of_block(int64_t block) const {
  ISOBATH_CHECK(0 <= block && block < config_.n_blocks, "block {} of {}", block, config_.n_blocks);
  std::vector<std::string> names;
  for (const std::string& name : tensors_->names()) {
    if (!name.starts_with(block_prefix(block))) continue;
    bool is_linear_weight = false;
    for (int p = 0; p < kProjections; ++p) {
      // `.weight` and what a quantized checkpoint stores instead: `.weight_packed`, `.weight_scale` …
      is_linear_weight |= name.starts_with(module_name(block, static_cast<Projection>(p)) + ".weight");
    }
    if (!is_linear_weight) names.push_back(name);
  }
  return names;
}

std::vector<std::string> CheckpointReader::tensors_outside_blocks() const {
  std::set<std::string> names;
  for (std::string& name : tensors_->names()) names.insert(std::move(name));
  for (int64_t block = 0; block < config_.n_blocks; ++block) {
    const std::string prefix = block_prefix(block);
    auto it = names.lower_bound(prefix);
    while (it != names.end() && it->starts_with(prefix)) it = names.erase(it);
  }
  return {names.begin(), names.end()};
}

}  // namespace isobath::model
