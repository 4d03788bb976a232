#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <isobath/comm/communicator.hpp>
#include <string>

namespace isobath::data {

/// Token sequences, ready to feed.
struct TokenSet {
  at::Tensor tokens;   ///< [n, T] i32, CPU, replicated
  at::Tensor lengths;  ///< [n] i32: tokens beyond lengths[i] are padding; == T where the file has none
  std::string tokenizer_sha256;  ///< of tokenizer.json; empty when the file does not say
  std::string bos_policy;        ///< "none" | "each" …, as the file says
  std::string digest;            ///< XXH3 of tokens and lengths, for fingerprints
  [[nodiscard]] int64_t n_sequences() const { return tokens.size(0); }
  [[nodiscard]] int64_t length() const { return tokens.size(1); }
};

/// What the model asks of a token file.
struct TokenRequirements {
  int64_t vocab_size = 0;
  std::string tokenizer_sha256{};  ///< of the model's tokenizer.json; empty: not compared
  int64_t n_sequences = 0;         ///< first n sequences are taken; 0: all
  int64_t length = 0;  ///< first `length` tokens of each; 0: all. Longer rows are cut, shorter ones an error
};

/// Reads and verifies a token file (.safetensors, .h5/.hdf5; layout in docs/formats.md).
///
/// Local. Throws DataError or IoError for: no or empty tokens, wrong dtype or rank, a
/// token < 0 or >= vocab_size (names the first: sequence, position, value), lengths outside [2, T], fewer
/// sequences than asked (says how many there are), another tokenizer (both digests).
[[nodiscard]] TokenSet read_tokens(const std::filesystem::path& path, const TokenRequirements& requirements);

/// read_tokens on rank 0, for all. Collective over `comm`. Throws AgreedFailure as it throws.
[[nodiscard]] TokenSet open_tokens(const std::filesystem::path& path, const TokenRequirements& requirements,
                                   const comm::Communicator& comm);

}  // namespace isobath::data
