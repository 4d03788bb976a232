#include <isobath/pipeline/panel_factor.hpp>

#include <ATen/ATen.h>

#include <isobath/comm/tree_sum.hpp>
#include <isobath/core/trace.hpp>
#include <isobath/pipeline/share.hpp>
#include <isobath/quant/slab.hpp>
#include <isobath/sensitivity/covariance.hpp>
#include <isobath/sensitivity/cross_covariance.hpp>

namespace isobath::pipeline {

/// Sums the panels in passes over the rows. make_sums: of some ranges of columns; add(sums, rows…).
template <class MakeSums, class Add>
static std::vector<at::Tensor> sum_in_passes(const PanelLayout& layout, const std::vector<int>& shard_owners,
                                             const comm::Communicator& comm, const MakeSums& make_sums,
                                             const Add& add, const ForEachRows& for_each_rows) {
  std::vector<at::Tensor> panels(layout.columns.size());
  for (size_t end = panels.size(); end > 0;) {
    const size_t first = end - std::min(end, kPanelsPerPass);
    auto sums = make_sums({layout.columns.begin() + static_cast<std::ptrdiff_t>(first),
                           layout.columns.begin() + static_cast<std::ptrdiff_t>(end)});
    std::vector<comm::TreeSum> trees;
    for (size_t p = first; p < end; ++p) trees.emplace_back(shard_owners, comm.rank());
    {
      const trace::Span span("covariance");
      for_each_rows([&](const at::Tensor& x, const Original& original,
                        const at::Tensor& weights) { add(sums, x, original, weights); },
                    [&](int64_t shard) {
                      std::vector<at::Tensor> total = sums.take();
                      for (size_t p = 0; p < trees.size(); ++p) trees[p].add(shard, std::move(total[p]));
                    });
    }
    const trace::Span span("reduction of H");
    for (size_t p = first; p < end; ++p) {
      panels[p] = trees[p - first].reduce_to(layout.owner(p), comm);
      if (comm.rank() == layout.owner(p)) quant::check_finite(panels[p], layout.columns[p].begin);
    }
    end = first;
  }
  return panels;
}

std::vector<at::Tensor> sum_panels(const PanelLayout& layout, const std::vector<int>& shard_owners,
                                   const comm::Communicator& comm, c10::Device device,
                                   const ForEachRows& for_each_rows) {
  return sum_in_passes(
      layout, shard_owners, comm,
      [&](std::vector<Range> columns) { return sensitivity::CovariancePanels(std::move(columns), device); },
      [](sensitivity::CovariancePanels& sums, const at::Tensor& x, const Original&,
         const at::Tensor& weights) { sums.add(x, weights); },
      for_each_rows);
}

std::vector<at::Tensor> sum_cross_panels(const PanelLayout& layout, const std::vector<int>& shard_owners,
                                         const comm::Communicator& comm, c10::Device device,
                                         const ForEachRows& for_each_rows) {
  const int64_t n_channels = layout.columns.back().end;
  return sum_in_passes(
      layout, shard_owners, comm,
      [&](std::vector<Range> columns) {
        return sensitivity::CrossCovariance(n_channels, std::move(columns), device, layout.n_residual);
      },
      [](sensitivity::CrossCovariance& sums, const at::Tensor& x, const Original& original,
         const at::Tensor& weights) { sums.add(x, original.input, weights, original.residual); },
      for_each_rows);
}

at::Tensor share_diagonal(const std::vector<at::Tensor>& panels, const PanelLayout& layout,
                          const comm::Communicator& comm) {
  at::Tensor diagonal = at::zeros({layout.columns.back().end}, at::kDouble);
  for (size_t p = 0; p < panels.size(); ++p) {
    if (comm.rank() != layout.owner(p)) continue;
    const Range columns = layout.columns[p];
    diagonal.slice(0, columns.begin, columns.end).copy_(panels[p].slice(0, columns.begin).diagonal());
  }
  share_disjoint(diagonal, comm);
  return diagonal;
}

bool factorize_panels(std::vector<at::Tensor> panels, const PanelLayout& layout, quant::Factor& factor,
                      const comm::DeviceCommunicator& devices) {
  const trace::Span span("factorize panels");
  const comm::Communicator& comm = devices.ranks();
  for (at::Tensor& panel : panels)
    if (panel.defined()) panel = quant::damped_panel(panel.to(devices.device()), factor);
  factor.curvature.zero_();
  for (size_t p = panels.size(); p-- > 0;) {
    const int owner = layout.owner(p);
    const Range columns = layout.columns[p];
    at::Tensor current;
    std::array<int64_t, 1> is_positive{1};
    if (comm.rank() == owner) {
      current = std::move(panels[p]);
      std::optional<quant::FeedbackPanel> feedback;
      if (quant::factorize_panel(current)) feedback = quant::feedback_panel(current);
      is_positive[0] = feedback ? 1 : 0;
      if (feedback) {
        factor.panels[p] = std::move(feedback->panel);
        factor.curvature.slice(0, columns.begin, columns.end).copy_(feedback->curvature);
      }
    }
    comm.broadcast(std::span<int64_t>(is_positive), owner);
    if (is_positive[0] == 0) return false;
    if (p == 0) break;
    if (comm.rank() != owner)
      current =
          at::empty({columns.end, columns.size()}, at::TensorOptions(at::kDouble).device(devices.device()));
    devices.broadcast(current, owner);
    for (size_t earlier = 0; earlier < p; ++earlier)
      if (panels[earlier].defined()) quant::subtract_panel(panels[earlier], current);
  }
  share_disjoint(factor.curvature, comm);
  return true;
}

static at::Tensor share_from(int owner, const at::Tensor& own, int64_t n_rows, int64_t n_columns,
                             const comm::DeviceCommunicator& devices) {
  at::Tensor shared =
      devices.ranks().rank() == owner
          ? own.to(devices.device())
          : at::empty({n_rows, n_columns}, at::TensorOptions(at::kFloat).device(devices.device()));
  devices.broadcast(shared, owner);
  return shared;
}

at::Tensor share_panel(const quant::Factor& factor, const PanelLayout& layout, size_t panel,
                       const comm::DeviceCommunicator& devices) {
  const trace::Span span("factor to all ranks");
  const Range columns = layout.columns[panel];
  return share_from(layout.owner(panel), factor.panels[panel], columns.end, columns.size(), devices);
}

at::Tensor share_cross_panel(const at::Tensor& own, const PanelLayout& layout, size_t panel,
                             const comm::DeviceCommunicator& devices) {
  const trace::Span span("C to all ranks");
  return share_from(layout.owner(panel), own, layout.columns.back().end + layout.n_residual,
                    layout.columns[panel].size(), devices);
}

at::Tensor share_slab(const quant::Factor& factor, const PanelLayout& layout, Range columns,
                      bool is_everywhere, const comm::DeviceCommunicator& devices) {
  const trace::Span span("factor to all ranks");
  return quant::slab_rows(layout.columns, columns, [&](size_t panel, Range rows) {
    const int owner = layout.owner(panel);
    const bool is_here = is_everywhere || devices.ranks().rank() == owner;
    const at::Tensor own = is_here ? factor.panels[panel].slice(0, rows.begin, rows.end) : at::Tensor();
    return is_everywhere ? own : share_from(owner, own, rows.size(), layout.columns[panel].size(), devices);
  });
}

}  // namespace isobath::pipeline
