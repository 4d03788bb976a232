#pragma once
#include <isobath/plan/time.hpp>
#include <string>
#include <utility>
#include <vector>

namespace isobath::plan {

// Passes over a weight when its codes become values again (quant::dequantize: codes 1+4, zero 8, scale 8, to
// storage 4+2) and are copied into the whole matrix (2), checked by digest (1) and shared (2).
inline constexpr double kCodeTraffic = 32;

/// Seconds of one block of the quantize pass by step, in the order of quantize_block; what it sends and
/// writes is added to `stage`.
[[nodiscard]] std::vector<std::pair<std::string, double>> block_steps(const Job& job, StageTime& stage);

}  // namespace isobath::plan
