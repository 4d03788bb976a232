#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <isobath/data/token_file.hpp>
#include <isobath/io/hdf5_file.hpp>
#include <isobath/io/safetensors_writer.hpp>
#include <optional>

#include "io/temporary_directory.hpp"
#include "support/mpi_environment.hpp"

namespace isobath::data {
namespace {

using testing::world;
namespace fs = std::filesystem;

constexpr int64_t kVocabulary = 100;

/// A folder that rank 0 makes and removes and all ranks name.
class TokenFile : public ::testing::Test {
 protected:
  TokenFile() {
    if (world().rank() == 0) directory_.emplace();
    std::string name = directory_ ? directory_->path().string() : "";
    world().broadcast(name, 0);
    folder_ = name;
  }
  ~TokenFile() override { world().barrier(); }

  /// Written by rank 0 only.
  fs::path safetensors(const io::NamedTensors& tensors,
                       const std::map<std::string, std::string>& notes = {}) const {
    const fs::path path = folder_ / "tokens.safetensors";
    if (directory_) io::write_safetensors(path, tensors, notes);
    return path;
  }

  /// The message of the AgreedFailure that every rank must get.
  static std::string refusal(const fs::path& path, TokenRequirements requirements = {},
                             ExitCode code = ExitCode::data) {
    if (requirements.vocab_size == 0) requirements.vocab_size = kVocabulary;
    try {
      static_cast<void>(open_tokens(path, requirements, world()));
    } catch (const AgreedFailure& failure) {
      EXPECT_EQ(failure.code(), code);
      return failure.what();
    }
    return "(nothing was thrown)";
  }

  std::optional<test::TemporaryDirectory> directory_;
  fs::path folder_;
};

void expect_contains(const std::string& message, std::initializer_list<const char*> parts) {
  for (const char* part : parts)
    EXPECT_NE(message.find(part), std::string::npos) << part << " in: " << message;
}

at::Tensor some_tokens() {
  return at::arange(12, at::kInt).reshape({3, 4});
}

TEST_F(TokenFile, EveryRankReceivesTheTokensOfASafetensorsFile) {
  const fs::path path =
      safetensors({{"tokens", some_tokens()}, {"lengths", at::tensor({4, 2, 3}, at::kInt)}},
                  {{"tokenizer_sha256", "abc"}, {"bos_policy", "each"}, {"vocab_size", "100"}});
  const TokenSet set = open_tokens(path, {.vocab_size = kVocabulary, .tokenizer_sha256 = "abc"}, world());
  EXPECT_TRUE(at::equal(set.tokens, some_tokens()));
  EXPECT_TRUE(at::equal(set.lengths, at::tensor({4, 2, 3}, at::kInt)));
  EXPECT_EQ(set.tokenizer_sha256, "abc");
  EXPECT_EQ(set.bos_policy, "each");
  EXPECT_EQ(set.n_sequences(), 3);
  EXPECT_EQ(set.length(), 4);
  EXPECT_EQ(set.digest.size(), 32u);
}

TEST_F(TokenFile, AnHdf5FileGivesTheSameSetAndDigest) {
  const fs::path path = folder_ / "tokens.h5";
  if (directory_) {
    io::Hdf5Writer writer(path);
    writer.write("tokens", some_tokens());
    writer.attribute("/", "tokenizer_sha256", std::string("abc"));
    writer.attribute("/", "vocab_size", int64_t{100});
    writer.attribute("/", "bos_policy", std::string("none"));
    writer.commit();
  }
  const TokenSet set = open_tokens(path, {.vocab_size = kVocabulary}, world());
  const TokenSet same =
      open_tokens(safetensors({{"tokens", some_tokens()}}), {.vocab_size = kVocabulary}, world());
  EXPECT_TRUE(at::equal(set.tokens, some_tokens()));
  EXPECT_EQ(set.digest, same.digest);
  EXPECT_EQ(set.tokenizer_sha256, "abc");
  EXPECT_EQ(set.bos_policy, "none");
  EXPECT_EQ(same.tokenizer_sha256, "");
}

TEST_F(TokenFile, AFileOfH5pyIsRead) {
  const TokenSet set =
      open_tokens(fs::path(ISOBATH_TEST_DATA) / "tokens_h5py.h5", {.vocab_size = kVocabulary}, world());
  EXPECT_TRUE(at::equal(set.tokens, some_tokens()));
  EXPECT_TRUE(at::equal(set.lengths, at::tensor({4, 2, 3}, at::kInt)));
  EXPECT_EQ(set.tokenizer_sha256, "abc");
  EXPECT_EQ(set.bos_policy, "each");
}

TEST_F(TokenFile, WithoutLengthsSequencesAreFull) {
  const TokenSet set =
      open_tokens(safetensors({{"tokens", some_tokens()}}), {.vocab_size = kVocabulary}, world());
  EXPECT_TRUE(at::equal(set.lengths, at::full({3}, 4, at::kInt)));
}

TEST_F(TokenFile, FewerAndShorterSequencesAreCut) {
  const fs::path path =
      safetensors({{"tokens", some_tokens()}, {"lengths", at::tensor({4, 2, 3}, at::kInt)}});
  const TokenSet set = open_tokens(path, {.vocab_size = kVocabulary, .n_sequences = 2, .length = 3}, world());
  EXPECT_TRUE(at::equal(set.tokens, some_tokens().slice(0, 0, 2).slice(1, 0, 3)));
  EXPECT_TRUE(at::equal(set.lengths, at::tensor({3, 2}, at::kInt)));
  const TokenSet whole = open_tokens(path, {.vocab_size = kVocabulary}, world());
  EXPECT_NE(set.digest, whole.digest);
}

TEST_F(TokenFile, TheFirstTokenOutsideTheVocabularyIsNamed) {
  at::Tensor tokens = some_tokens();
  tokens[1][2] = 100;
  tokens[2][0] = -1;
  expect_contains(refusal(safetensors({{"tokens", tokens}}, {{"vocab_size", "128256"}})),
                  {"sequence 1", "position 2", "token 100", "[0, 100)", "128256"});
  tokens[1][2] = 99;
  expect_contains(refusal(safetensors({{"tokens", tokens}})), {"sequence 2", "position 0", "token -1"});
  EXPECT_EQ(open_tokens(safetensors({{"tokens", tokens}}), {.vocab_size = 100, .n_sequences = 2}, world())
                .n_sequences(),
            2);
}

TEST_F(TokenFile, WrongTypesAndShapesAreRefused) {
  expect_contains(refusal(safetensors({{"tokens", some_tokens().to(at::kLong)}})), {"Long", "int32"});
  expect_contains(refusal(safetensors({{"tokens", some_tokens().flatten()}})),
                  {"[12]", "[sequences, length]"});
  expect_contains(refusal(safetensors({{"tokens", at::empty({0, 4}, at::kInt)}})), {"empty"});
  expect_contains(refusal(safetensors({{"tokens", at::empty({4, 0}, at::kInt)}})), {"empty"});
  expect_contains(refusal(safetensors({{"ids", some_tokens()}})), {"no tensor tokens"});
  expect_contains(refusal(safetensors({{"tokens", some_tokens()}, {"lengths", at::full({2}, 4, at::kInt)}})),
                  {"lengths", "[2]", "[3]"});
  expect_contains(refusal(safetensors({{"tokens", some_tokens()}, {"lengths", at::full({3}, 4, at::kLong)}})),
                  {"lengths", "Long"});
}

TEST_F(TokenFile, LengthsOutsideTheSequenceAreRefused) {
  for (const int bad : {-1, 0, 1, 5}) {
    const at::Tensor lengths = at::tensor({4, bad, 4}, at::kInt);
    expect_contains(refusal(safetensors({{"tokens", some_tokens()}, {"lengths", lengths}})),
                    {"sequence 1", "outside [2, 4]"});
  }
  expect_contains(refusal(safetensors({{"tokens", at::zeros({3, 1}, at::kInt)}})), {"outside [2, 1]"});
}

TEST_F(TokenFile, MoreThanThereIsCannotBeAsked) {
  const fs::path path = safetensors({{"tokens", some_tokens()}});
  expect_contains(refusal(path, {.n_sequences = 4}), {"4 sequences are asked for", "holds 3"});
  expect_contains(refusal(path, {.length = 5}), {"5 tokens are asked for", "have 4"});
}

TEST_F(TokenFile, AnotherTokenizerIsRefusedWithBothDigests) {
  const fs::path path = safetensors({{"tokens", some_tokens()}}, {{"tokenizer_sha256", "abc"}});
  expect_contains(refusal(path, {.tokenizer_sha256 = "def"}), {"abc", "def", "tokenize again"});
}

TEST_F(TokenFile, AMissingMalformedOrForeignFileFailsOnEveryRank) {
  expect_contains(refusal(folder_ / "absent.safetensors", {}, ExitCode::io),
                  {"absent.safetensors", "No such file"});
  expect_contains(refusal(folder_ / "tokens.npy"), {".safetensors, .h5 or .hdf5"});
  if (directory_) test::write_bytes(folder_ / "bad.h5", "text");
  expect_contains(refusal(folder_ / "bad.h5"), {"not an HDF5 file"});
}

}  // namespace
}  // namespace isobath::data
