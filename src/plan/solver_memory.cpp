#include "solver_memory.hpp"

#include <array>
#include <isobath/quant/factor.hpp>

namespace isobath::plan {

double largest_module(const Job& job) {
  double largest = 0;
  for (int p = 0; p < model::kProjections; ++p) {
    const auto shape = model::module_shape(job.model, static_cast<model::Projection>(p));
    largest = std::max(largest, static_cast<double>(shape.rows) * static_cast<double>(shape.columns));
  }
  return largest;
}

double dequantize_bytes(const Job& job) {
  constexpr double kStorageBytes = 2;
  const double e = job.shapes.element_bytes;
  return (kStorageBytes + (e == kStorageBytes ? 0 : e)) * largest_module(job);
}

double tree_levels(int64_t n_shards) {
  return 1 + std::floor(std::log2(static_cast<double>(n_shards)));
}

namespace {

// M of gptaq at its peak: five f64 matrices and the result.
constexpr double kGptaqBytes = 5 * 8 + 4;

/// What solving an input set holds on a rank, by phase. Without devices the host holds both.
struct SolverMemory {
  double device_sums = 0;  ///< while H is summed
  double host_sums = 0;    ///< partial sums, and panels of H that are complete
  double device_factorizing = 0, factorizing = 0;
  double device_solving = 0, solving = 0;
};

/// Rows in work on one rank: what the column loop holds of its tiles of the modules that are solved together:
/// all of a set, or those that one factor serves which is spread.
struct RowMemory {
  double host = 0, device = 0;
};
RowMemory row_memory(const Job& job, int set, double d) {
  const double e = job.shapes.element_bytes;
  const double groups = job.is_weighted() ? static_cast<double>(job.config.sensitivity.row_groups) : 1;
  const bool is_one_module = job.is_weighted() && job.is_spread(d);
  double weights = 0, largest = 0;
  for (const model::Projection p : model::input_set(set)) {
    const double rows = std::ceil(static_cast<double>(model::module_shape(job.model, p).rows) / groups);
    const double mine = job.largest_row_share(rows) * d;
    largest = std::max(largest, mine);
    weights = is_one_module ? largest : weights + groups * mine;
  }
  constexpr double kHeld = 4 + 1;  // errors in f32, codes
  // With a correction W C and the target in f32, on the host.
  const double corrected = job.is_asymmetric() ? 8 : 0;
  // A refinement works on a copy of the codes, on the host, with one slab of the factor at a time.
  const config::Quantization& quantization = job.config.quantization;
  const double slab = job.refines() ? slab_columns(d, quantization) : 0, slab_bytes = 4 * slab * (d + slab),
               refining = job.refines() ? (kHeld + 1 + corrected) * weights + slab_bytes : 0;
  if (!job.cluster.has_devices()) return {.host = std::max((kHeld + corrected) * weights, refining)};
  // The rows, or W C and the target in f32, are there all the time. DeviceLoop starts from copies, where
  // codes are not there yet: in f32, transposed, and with dead channels cleared; then panels of the factor
  // come, one at a time. A refinement has a slab and its transpose, and of its columns five copies of all
  // rows. Back come codes and, to judge what was corrected, differences in f32.
  const double target = job.is_asymmetric() ? corrected : e, starting = (e < 4 ? 4 : 0) + 8;
  const double in_work =
      std::max((starting - kHeld) * largest + 4 * std::min(d, panel_columns()) * d,
               job.refines() ? 4 * slab * (2 * d + slab) + 5 * 4 * slab * weights / d : 0.0);
  return {.host = weights, .device = (target + kHeld) * weights + in_work};
}

SolverMemory whole_memory(const Job& job, int set, double d) {
  // Of the sums H is one, and C one or with the residual stream's rows more.
  const double matrix = 4 * d * d, triangle = panel_entries(d), cross = 1 + job.residual_channels(set) / d,
               sums = job.is_asymmetric() ? 1 + cross : 1;
  const auto units = static_cast<double>(job.units_of(set)),
             mine = static_cast<double>(job.units_of_root(set));
  SolverMemory memory;
  // One partial sum arrives; on devices the others stay there until all shards are done.
  const bool has_devices = job.cluster.has_devices();
  const double partial = sums * units * tree_levels(job.layout.shards_per_rank) * matrix;
  memory.device_sums = sums * units * matrix + (has_devices ? partial : 0);
  memory.host_sums = (has_devices ? mine * sums * matrix + matrix : partial) + matrix;
  // H and C of its own units, the factors of those it has done, and one in f64; or gptaq's M in work.
  const bool is_qep = job.is_qep(), is_gptaq = job.is_asymmetric() && !is_qep;
  const double factors = is_qep ? 2 : 1, done = factors * 4 * triangle + (is_gptaq ? matrix : 0);
  memory.factorizing = mine * sums * matrix + (mine - 1) * done + (factors - 1) * 4 * triangle +
                       (is_gptaq ? 4 * triangle + kGptaqBytes * d * d : 8 * triangle);
  // Small factors go to all ranks at once, those of wider ones panel by panel, to the devices where there are
  // some; M is everywhere, C on the roots but for a panel of it.
  const bool at_once = d <= static_cast<double>(quant::kWholeColumns);
  const double panel = 4 * std::min(d, panel_columns()) * d;
  memory.device_solving = (at_once ? units * factors * 4 * triangle : panel) +
                          (job.is_asymmetric() ? cross * panel : 0) + (is_gptaq && has_devices ? matrix : 0);
  memory.solving = (at_once ? 0 : mine * factors * 4 * triangle) + (is_gptaq ? units * matrix : 0) +
                   (job.is_asymmetric() ? mine * cross * matrix : 0);
  return memory;
}

/// Of one unit at a time, in panels that all ranks share.
SolverMemory spread_memory(const Job& job, int set, double d) {
  const double ranks = static_cast<double>(job.layout.n_ranks()), width = panel_columns();
  const double panel = width * d, own = panel_entries(d) / ranks;
  SolverMemory memory;
  // The first pass sums the widest panels, when none is complete; the last one when all are.
  constexpr double kPanelsPerPass = 6;  // pipeline/panel_factor.hpp
  const bool has_devices = job.cluster.has_devices();
  const double partial = 4 * kPanelsPerPass * tree_levels(job.layout.shards_per_rank) * panel;
  memory.device_sums = 4 * kPanelsPerPass * panel + (has_devices ? partial : 0);
  memory.host_sums =
      has_devices ? 4 * own + 2 * 4 * panel : std::max(partial + 4 * panel, 4 * own - memory.device_sums);
  // A panel on its way, its columns divided, and the result in f32. A device takes panels from the host's H.
  memory.device_factorizing = 8 * own + (8 + 8 + 4) * panel;
  memory.factorizing = has_devices ? 4 * own : 0;
  memory.device_solving = 4 * own + 4 * panel;
  if (!job.is_qep()) return memory;
  // H is kept until its second factor is there; then panels of C are summed beside both.
  const double cross = 1 + job.residual_channels(set) / d, c = cross * 4 * d * d / ranks,
               factors = 2 * 4 * own;
  memory.device_factorizing += 4 * own;
  if (has_devices) {
    memory.device_factorizing = std::max(memory.device_factorizing, factors + cross * memory.device_sums);
    memory.factorizing = std::max(memory.factorizing, c + cross * 2 * 4 * panel);
  } else {
    memory.device_factorizing =
        std::max(memory.device_factorizing, factors + c + cross * (memory.device_sums + partial + 4 * panel));
  }
  memory.device_solving = factors + (1 + cross) * 4 * panel;
  memory.solving = c;
  return memory;
}

}  // namespace

void add_solver(const Job& job, RankMemory& memory) {
  const bool has_devices = job.cluster.has_devices();
  RankMemory::Item h{"H, factors and rows"};
  double host = dequantize_bytes(job);
  std::array<double, model::kInputSets> factorizing{};
  for (int set = 0; set < model::kInputSets; ++set) {
    const auto d = static_cast<double>(model::module_shape(job.model, model::input_set(set).front()).columns);
    const SolverMemory phases = job.is_spread(d) ? spread_memory(job, set, d) : whole_memory(job, set, d);
    const RowMemory rows = row_memory(job, set, d);
    const double on_host = has_devices ? 0 : 1;
    h.device_bytes = std::max(h.device_bytes, phases.device_sums);
    if (has_devices)
      h.device_bytes =
          std::max({h.device_bytes, phases.device_factorizing, phases.device_solving + rows.device});
    host = std::max({host, on_host * phases.device_sums + phases.host_sums,
                     on_host * phases.device_solving + phases.solving + rows.host});
    const double factorizing_here = on_host * phases.device_factorizing + phases.factorizing;
    if (job.is_spread(d))
      host = std::max(host, factorizing_here);  // all ranks do
    else
      factorizing[static_cast<size_t>(set)] = factorizing_here;
  }
  // Without devices the same memory holds all of it.
  h.host_bytes = host - (has_devices ? 0 : h.device_bytes);
  memory.items.push_back(h);
  for (int set = 0; set < model::kInputSets; ++set) {
    const double more = std::max(0.0, factorizing[static_cast<size_t>(set)] - host);
    memory.root_bytes = std::max(memory.root_bytes, more);
    memory.node_root_bytes = std::max(
        memory.node_root_bytes, static_cast<double>(std::min(job.ranks_on_node(), job.units_of(set))) * more);
  }
}

}  // namespace isobath::plan
