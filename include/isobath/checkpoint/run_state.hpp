#pragma once
#include <boost/serialization/version.hpp>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace isobath::checkpoint {

/// Where a run stands; archived by Boost.Serialization inside a generation and opened only after its digest
/// was verified.
struct RunState {
  std::string stage;                    ///< "quantize" or "tune"
  int64_t next_block = 0;               ///< first block that is not quantized yet
  int64_t sensitivity_from_block = -1;  ///< block before which D was last re-estimated; −1: D of measure
  uint64_t seed = 0;
  std::map<std::string, int> bits;          ///< module -> bits of what is done
  std::vector<std::string> module_records;  ///< one JSON object per quantized module, in order
  /// One JSON object per decision to measure D again or not, in order; since version 1.
  std::vector<std::string> reestimations;
  /// Of the tuning of scales, since version 2: steps taken; by epoch, the divergence summed over its tokens
  /// so far, and their number.
  int64_t next_step = 0;
  std::vector<double> epoch_kl, epoch_tokens;
  std::vector<std::string> block_records;  ///< one JSON object per quantized block, in order; since version 3

  template <class Archive>
  void serialize(Archive& archive, unsigned version) {
    archive& stage& next_block& sensitivity_from_block& seed& bits& module_records;
    if (version >= 1) archive& reestimations;
    if (version >= 2) archive& next_step& epoch_kl& epoch_tokens;
    if (version >= 3) archive& block_records;
  }
};

}  // namespace isobath::checkpoint

BOOST_CLASS_VERSION(isobath::checkpoint::RunState, 3)
