#include <isobath/pipeline/row_grouping.hpp>

#include <ATen/ATen.h>

#include <isobath/core/log.hpp>
#include <isobath/core/timer.hpp>
#include <isobath/core/trace.hpp>
#include <isobath/pipeline/drift.hpp>
#include <isobath/pipeline/row_profile_observer.hpp>
#include <isobath/pipeline/share.hpp>
#include <isobath/pipeline/statistics_files.hpp>
#include <nlohmann/json.hpp>

#include "measure_steps.hpp"

namespace isobath::pipeline {
namespace {

/// What clustering made of the deviation of profiles: columns of the table that ranks fill in.
enum Deviation : int64_t { kOfAll, kWithin, kDeviations };

/// Clusters of a linear's rows, found on the replica that holds their profiles, sent to all replicas.
sensitivity::RowGroups cluster_on_root(const Session& session, const at::Tensor& profiles, int root,
                                       int64_t block, model::Projection projection, at::Tensor deviations) {
  const comm::Communicator& replicas = session.grid->replicas();
  const int64_t n_groups = session.config.sensitivity.row_groups;
  const int64_t n_rows = model::module_shape(session.model(), projection).rows;
  sensitivity::RowGroups groups{.order = at::empty({n_rows}, at::kLong), .ranges = {}};
  at::Tensor sizes = at::empty({n_groups}, at::kLong);
  if (replicas.rank() == root) {
    const trace::Span span("cluster rows", block);
    try {
      groups = sensitivity::cluster_rows(
          profiles, n_groups, session.config.calibration.seed,
          static_cast<uint64_t>(block * model::kProjections + static_cast<int64_t>(projection)));
    } catch (const Error&) {
      std::throw_with_nested(
          NumericError(fmt::format("grouping rows of {}", model::module_name(block, projection))));
    }
    for (int64_t k = 0; k < n_groups; ++k) sizes[k] = groups.ranges[static_cast<size_t>(k)].size();
    deviations[kOfAll] = sensitivity::deviation_within(profiles, {.order = {}, .ranges = {{0, n_rows}}});
    deviations[kWithin] = sensitivity::deviation_within(profiles, groups);
  }
  replicas.broadcast(groups.order, root);
  replicas.broadcast(sizes, root);
  if (replicas.rank() == root) return groups;
  for (int64_t k = 0, begin = 0; k < n_groups; ++k) {
    groups.ranges.push_back({begin, begin + sizes[k].item<int64_t>()});
    begin = groups.ranges.back().end;
  }
  return groups;
}

}  // namespace

std::map<int64_t, BlockRowGroups> measure_row_groups(const Session& session,
                                                     const CalibrationSet& calibration,
                                                     const model::WeightStore& weights,
                                                     report::EventLog& events) {
  const Timer timer;
  const MeasurePass pass{.title = "group rows", .source = {}, .directory = {}};
  const std::vector<data::Microbatch> probe =
      probe_microbatches(calibration.shards, session.config.sensitivity.grouping_sequences);
  std::map<int64_t, BlockRowGroups> found;
  at::Tensor deviations =
      at::zeros({session.model().n_blocks, model::kProjections, kDeviations}, at::kDouble);
  const auto observation = Observation::of<RowProfileObserver>(
      [&](int64_t block, const model::BlockWeights&) {
        return std::make_unique<RowProfileObserver>(session, calibration, block, probe);
      },
      [&](int64_t block, RowProfileObserver& observer) {
        for (int p = 0; p < model::kProjections; ++p) {
          const auto projection = static_cast<model::Projection>(p);
          found[block][static_cast<size_t>(p)] =
              cluster_on_root(session, observer.reduce(projection), root_of_block(session, block), block,
                              projection, deviations[block][p]);
        }
      });
  (void)visit_probe(session, calibration, weights, pass, probe, observation);
  share_disjoint(deviations, session.world());
  const auto of_all = deviations.select(2, kOfAll).sum().item<double>(),
             within = deviations.select(2, kWithin).sum().item<double>();
  const double remaining = of_all > 0 ? within / of_all : 0;
  log::info(
      "rows in {} clusters by {} microbatches in {:.1f} s: {:.1f} % of the deviation of their profiles is "
      "within clusters",
      session.config.sensitivity.row_groups, probe.size(), timer.seconds(), 100 * remaining);
  events.write("rows grouped", {{"seconds", timer.seconds()},
                                {"microbatches", std::ssize(probe)},
                                {"groups", session.config.sensitivity.row_groups},
                                {"deviation_within", remaining}});
  return found;
}

BlockRowGroups row_groups_in(const Session& session, const std::filesystem::path& statistics, int64_t block) {
  if (!clusters_rows(session.config.sensitivity)) return row_groups_of(session);
  BlockRowGroups groups = read_row_groups(statistics, block);
  for (int p = 0; p < model::kProjections; ++p) {
    const auto& [order, ranges] = groups[static_cast<size_t>(p)];
    const auto projection = static_cast<model::Projection>(p);
    const int64_t n_rows = model::module_shape(session.model(), projection).rows;
    if (order.numel() != n_rows || std::ssize(ranges) != session.config.sensitivity.row_groups)
      fail<DataError>("{}: expected {} row groups of the {} output channels of {}, found {} of {}",
                      statistics_path(statistics, block).string(), session.config.sensitivity.row_groups,
                      n_rows, model::name_of(projection), ranges.size(), order.numel());
  }
  return groups;
}

}  // namespace isobath::pipeline
