#include <isobath/core/random.hpp>

namespace isobath {

std::array<uint32_t, 4> philox4x32(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
  constexpr uint64_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
  constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = kMultiplier0 * counter[0], product1 = kMultiplier1 * counter[2];
    counter = {static_cast<uint32_t>(product1 >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(product1),
               static_cast<uint32_t>(product0 >> 32) ^ counter[3] ^ key[1], static_cast<uint32_t>(product0)};
    key[0] += kWeyl0;
    key[1] += kWeyl1;
  }
  return counter;
}

std::array<uint32_t, 4> CounterRandom::words(uint64_t sequence, uint32_t token, uint32_t sample) const {
  // 32 bits of sequence suffice for 4e9 calibration sequences; its upper half joins the purpose.
  return philox4x32({static_cast<uint32_t>(sequence), token, sample,
                     static_cast<uint32_t>(purpose_) ^ static_cast<uint32_t>(sequence >> 32) << 8},
                    {static_cast<uint32_t>(seed_), static_cast<uint32_t>(seed_ >> 32)});
}

double CounterRandom::uniform(uint64_t sequence, uint32_t token, uint32_t sample) const {
  const auto word = words(sequence, token, sample);
  const uint64_t bits = (static_cast<uint64_t>(word[0]) << 32 | word[1]) >> 11;
  return static_cast<double>(bits) * 0x1.0p-53;
}

}  // namespace isobath
