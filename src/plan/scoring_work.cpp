#include <cmath>
#include <isobath/plan/work.hpp>

namespace isobath::plan {
namespace {

// sensitivity::perturbation_scores: rows of a tile.
constexpr double kTileRows = 512;

// Operations started, a tile: product, f32, square, sum of a sequence; product with ΔW, its sum, what probes
// see of it of a sequence and candidate. A sequence: energies of all candidates, their sums.
constexpr double kSequenceOperations = 4, kPairOperations = 4, kEnergyOperations = 8;

}  // namespace

Work score_widths(const Shapes& s, double n_tokens, double length, const config::Sensitivity& sensitivity) {
  const double e = s.element_bytes, n_sequences = n_tokens / length,
               n_widths = static_cast<double>(sensitivity.gram_bits.size()),
               n_probes = static_cast<double>(sensitivity.probes);
  const bool is_solved = !sensitivity.gram_checkpoints.empty();
  const double to_f32 = e < 4 ? e + 4 : 0;
  // W to f32; of a checkpoint: bf16 to f32 6, difference 12; rounded (quant::round_on_grid): four passes over
  // f32, to storage and back 12, difference 12.
  const double candidate_bytes = to_f32 + (is_solved ? 18 : 56), candidate_operations = is_solved ? 4 : 12;
  // GᵀX written 4 or e, to f32, squared 8 and added 4.
  const double sequence_bytes = e + to_f32 + 12;
  // Times ΔW 12, added 4; ΔW read by the product with the signs 4.
  constexpr double kPairBytes = 20;
  Work total;
  for (int p = 0; p < model::kProjections; ++p) {
    const auto shape = model::module_shape(*s.model, static_cast<model::Projection>(p));
    const auto rows = static_cast<double>(shape.rows), columns = static_cast<double>(shape.columns);
    const double weights = rows * columns;
    total +=
        {.gemm_flops = 2 * n_tokens * weights,
         .f32_flops = 2 * n_widths * n_probes * columns * (n_sequences * rows + n_tokens),
         .traffic_bytes =
             weights * (n_sequences * (sequence_bytes + n_widths * kPairBytes) + n_widths * candidate_bytes),
         .n_operations =
             std::ceil(rows / kTileRows) * (n_sequences * (kSequenceOperations + n_widths * kPairOperations) +
                                            n_widths * candidate_operations) +
             n_sequences * kEnergyOperations};
  }
  return static_cast<double>(sensitivity.samples) * total;
}

Work score_grids(const Shapes& s, const config::RunConfig& config, double threads) {
  Work total;
  if (!config.sensitivity.gram_checkpoints.empty()) return total;
  const config::Quantization& q = config.quantization;
  for (const int bits : config.sensitivity.gram_bits)
    total.candidates += s.block_linears * candidate_grids(bits, q.symmetric, q.clip_search) / threads;
  return total;
}

double score_bytes(const Shapes& s, double n_sequences) {
  double widest = 0;
  for (int p = 0; p < model::kProjections; ++p)
    widest = std::max(widest, static_cast<double>(
                                  model::module_shape(*s.model, static_cast<model::Projection>(p)).columns));
  // A tile's GᵀX of each sequence, ΔW, the weight it is the change of, and one product.
  return 4 * kTileRows * widest * (n_sequences + 3);
}

}  // namespace isobath::plan
