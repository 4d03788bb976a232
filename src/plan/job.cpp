#include <isobath/plan/job.hpp>

#include <c10/core/ScalarType.h>
#include <isobath/core/error.hpp>
#include <isobath/model/balance.hpp>
#include <isobath/quant/row_solver.hpp>

namespace isobath::plan {
namespace {

// A group that does not divide is refused by `check` and by the run; here it must not end the plan.
int64_t group_of(const config::ModuleChoice& choice, int64_t columns) {
  return choice.group > 0 && columns % choice.group == 0 ? choice.group : 0;
}

}  // namespace

int Layout::stage_of(int64_t block) const {
  for (size_t stage = 0; stage < blocks.size(); ++stage)
    if (blocks[stage].contains(block)) return static_cast<int>(stage);
  contract_violated("block", fmt::format("block {} belongs to no stage", block));
}

Layout Layout::of(const config::Calibration& calibration, const model::ModelConfig& model, int stages,
                  int replicas, const model::Activations& activations) {
  Layout layout{.stages = stages, .replicas = replicas};
  layout.blocks = model::balance_stages(model, calibration.length, stages, activations);
  const int64_t n_sequences = calibration.sequences;
  layout.n_shards = std::min(calibration.logical_shards, n_sequences);
  layout.largest_microbatch =
      std::min(calibration.microbatch, partition(n_sequences, layout.n_shards, 0).size());
  int64_t n_microbatches = 0;
  // The first shards are the larger ones, and the first holders have more of them.
  const Range of_replica = partition(layout.n_shards, replicas, 0);
  const Range of_rank = partition(layout.n_shards, layout.n_ranks(), 0);
  layout.shards_per_replica = of_replica.size();
  layout.shards_per_rank = of_rank.size();
  layout.microbatches_per_replica = layout.sequences_per_replica = layout.sequences_per_rank = 0;
  for (int64_t shard = 0; shard < layout.n_shards; ++shard) {
    const int64_t size = partition(n_sequences, layout.n_shards, shard).size();
    const int64_t microbatches = (size + calibration.microbatch - 1) / calibration.microbatch;
    n_microbatches += microbatches;
    if (of_replica.contains(shard)) {
      layout.microbatches_per_replica += microbatches;
      layout.sequences_per_replica += size;
    }
    if (of_rank.contains(shard)) layout.sequences_per_rank += size;
  }
  const int64_t per_segment = model::shards_per_segment(n_microbatches, layout.n_shards, stages);
  layout.segments = (layout.shards_per_replica + per_segment - 1) / per_segment;
  return layout;
}

bool computes_bf16(const config::RunConfig& config, const model::ModelConfig& model, const Cluster& cluster) {
  if (config.compute_dtype != "auto") return config.compute_dtype == "bfloat16";
  return model.dtype == at::ScalarType::BFloat16 && cluster.prefers_bf16();
}

Job::Job(const config::RunConfig& config, const model::ModelConfig& model, const Cluster& cluster, int stages,
         int replicas)
    : config(config),
      model(model),
      cluster(cluster),
      computes_bf16(plan::computes_bf16(config, model, cluster)),
      layout(Layout::of(config.calibration, model, stages, replicas, kept_activations())),
      shapes(Shapes::of(model, computes_bf16,
                        cluster.has_kernels() && computes_bf16 == cluster.prefers_bf16(),
                        cluster.has_gram() && computes_bf16 == cluster.prefers_bf16())) {}

double Job::token_weight_bytes() const {
  return 4.0 * model::kProjections * static_cast<double>(config.sensitivity.row_groups) * n_tokens();
}

int64_t Job::units_of(int set) const {
  const auto n_modules = static_cast<int64_t>(model::input_set(set).size());
  return is_weighted() ? n_modules * config.sensitivity.row_groups : 1;
}

int64_t Job::kept_blocks(int stage) const {
  const int64_t n_blocks = layout.blocks[static_cast<size_t>(stage)].size();
  return std::min(n_blocks, model::count_kept_blocks(model, kept_activations(), layout.stages - stage));
}

model::Activations Job::kept_activations() const {
  return {.n_tokens = config.calibration.microbatch * config.calibration.length,
          .element_size = computes_bf16 ? 2 : 4,
          .limit_gib = is_streamed() ? 0 : config.ranks.activation_gib};
}

bool Job::is_spread(double d) const {
  return d > static_cast<double>(quant::kWholeColumns) && !needs_whole();
}

double Job::largest_row_share(double n_rows) const {
  const auto height = static_cast<double>(quant::tile_rows(static_cast<int64_t>(n_rows)));
  return std::min(n_rows, height * std::ceil(std::ceil(n_rows / height) / layout.n_ranks()));
}

double Job::hidden_bytes() const {
  return static_cast<double>(streams()) * n_tokens() * shapes.d * shapes.element_bytes;
}

int64_t Job::units_of_root(int set) const {
  return (units_of(set) + layout.n_ranks() - 1) / layout.n_ranks();
}

double Job::scales_of_block(int64_t block) const {
  double scales = 0;
  for (int p = 0; p < model::kProjections; ++p) {
    const auto projection = static_cast<model::Projection>(p);
    const auto choice = config::choice_for(config.quantization, model::module_name(block, projection));
    if (!choice.quantized) continue;
    const auto shape = model::module_shape(model, projection);
    const int64_t group = group_of(choice, shape.columns);
    scales += static_cast<double>(shape.rows * (group > 0 ? shape.columns / group : 1));
  }
  return scales;
}

double Job::quantized_block_bytes(int64_t block, int bits) const {
  double bytes = 2 * shapes.d * static_cast<double>(c10::elementSize(model.dtype));
  for (int p = 0; p < model::kProjections; ++p) {
    const auto projection = static_cast<model::Projection>(p);
    const auto choice = config::choice_for(config.quantization, model::module_name(block, projection));
    const auto shape = model::module_shape(model, projection);
    const double n_weights = static_cast<double>(shape.rows) * static_cast<double>(shape.columns);
    const int64_t group = group_of(choice, shape.columns);
    bytes +=
        n_weights / 8 *
        (choice.quantized ? quant::bits_per_weight(shape.columns, {.bits = bits > 0 ? bits : choice.bits,
                                                                   .group = group,
                                                                   .symmetric = config.quantization.symmetric,
                                                                   .storage = model.dtype})
                          : 8.0 * static_cast<double>(c10::elementSize(model.dtype)));
  }
  return bytes;
}

double Job::stored_block_bytes() const {
  return shapes.block_weight_bytes() * static_cast<double>(c10::elementSize(model.dtype)) /
         shapes.element_bytes;
}

double Job::stored_end_bytes() const {
  return (model.tied_embeddings ? 1 : 2) * shapes.vocabulary * shapes.d *
         static_cast<double>(c10::elementSize(model.dtype));
}

int64_t Job::nodes() const {
  const int64_t per_node = cluster.ranks_per_node;
  return (layout.n_ranks() + per_node - 1) / per_node;
}

}  // namespace isobath::plan
