#pragma once
#include <array>
#include <cstdint>

namespace isobath {

/// What a random number is for; part of its key, so that two uses never share numbers.
enum class RandomPurpose : uint32_t {
  fisher_label = 1,
  probe_sign = 2,
  sequence_sample = 3,
  row_profile = 4,
  row_cluster = 5
};

/// Counter-based random numbers: a value depends only on its key and counter, never on who asks or in which
/// order, so any rank computes the same number for the same token.
///
/// Source   Philox4x32-10: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC11).
class CounterRandom {
 public:
  CounterRandom(uint64_t seed, RandomPurpose purpose) : seed_(seed), purpose_(purpose) {}

  /// Four 32-bit words for (sequence, token, sample).
  [[nodiscard]] std::array<uint32_t, 4> words(uint64_t sequence, uint32_t token, uint32_t sample) const;
  /// Uniform in [0, 1) with 53 bits.
  [[nodiscard]] double uniform(uint64_t sequence, uint32_t token, uint32_t sample) const;

 private:
  uint64_t seed_;
  RandomPurpose purpose_;
};

/// The bare Philox4x32-10 block function, for known-answer tests.
[[nodiscard]] std::array<uint32_t, 4> philox4x32(std::array<uint32_t, 4> counter,
                                                 std::array<uint32_t, 2> key);

}  // namespace isobath
