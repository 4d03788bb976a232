#include <isobath/quant/slab.hpp>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <isobath/core/error.hpp>
#include <isobath/kernels/device.hpp>
#include <isobath/quant/row_solver.hpp>
#include <utility>

namespace isobath::quant {

std::vector<Range> refinement_slabs(const std::vector<Range>& panels, int64_t group_width) {
  std::vector<Range> slabs;
  int64_t begin = 0;
  for (const Range& panel : panels) {
    const bool ends_group = panel.end % group_width == 0 || panel.end == panels.back().end;
    if (!ends_group) continue;
    if (panel.end - begin > kWidestSlab) return panels;
    slabs.push_back({begin, panel.end});
    begin = panel.end;
  }
  return slabs;
}

at::Tensor slab_rows(const std::vector<Range>& panels, Range columns,
                     const std::function<at::Tensor(size_t panel, Range rows)>& part) {
  at::Tensor rows;
  for (size_t p = 0; p < panels.size(); ++p) {
    if (panels[p].end <= columns.begin) continue;
    const Range above{columns.begin, std::min(columns.end, panels[p].end)};
    const at::Tensor own = part(p, above);
    if (!rows.defined()) rows = at::zeros({columns.size(), panels.back().end - columns.begin}, own.options());
    rows.slice(0, 0, above.size())
        .slice(1, panels[p].begin - columns.begin, panels[p].end - columns.begin)
        .copy_(own);
  }
  return rows;
}

/// a aᵀ, rows of the result shared by the threads: inside a parallel region a product has one thread, and its
/// bits do not depend on how many there are.
static at::Tensor row_products(const at::Tensor& a) {
  if (!a.is_cpu()) {
    const at::Tensor columns = a.t().contiguous();
    at::Tensor product = at::zeros({a.size(0), a.size(0)}, a.options());
    kernels::add_device_product(product, columns, columns);
    return product;
  }
  at::Tensor product = at::empty({a.size(0), a.size(0)}, at::kFloat);
  const int64_t parts = (a.size(0) + kRowTile - 1) / kRowTile;
  at::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) {
      const int64_t begin = part * kRowTile, end = std::min(a.size(0), begin + kRowTile);
      at::Tensor rows = product.slice(0, begin, end);
      at::mm_out(rows, a.slice(0, begin, end), a.t());
    }
  });
  return product;
}

Slab::Slab(Range slab_columns, at::Tensor unit, const Factor& factor, bool is_for_sweep)
    : columns(slab_columns), rows(std::move(unit)) {
  ISOBATH_CHECK(rows.size(0) == columns.size() && rows.size(1) == factor.n_columns() - columns.begin,
                "a slab [{}, {}] for columns {} … {} of {}", rows.size(0), rows.size(1), columns.begin,
                columns.end, factor.n_columns());
  const c10::Device device = rows.device();
  rows.mul_((factor.curvature.slice(0, columns.begin) / factor.mean).sqrt().to(device, at::kFloat));
  if (!is_for_sweep) return;
  curvature = row_products(rows);
  const at::Tensor dead =
      factor.dead.index_select(0, factor.order.slice(0, columns.begin, columns.end)).to(device);
  curvature.masked_fill_(dead.unsqueeze(0), 0).masked_fill_(dead.unsqueeze(1), 0);
}

std::vector<Range> panels_of(const Factor& factor) {
  std::vector<Range> panels;
  for (const at::Tensor& panel : factor.panels)
    panels.push_back({panel.size(0) - panel.size(1), panel.size(0)});
  return panels;
}

Slab slab_of(const Factor& factor, Range columns, bool is_for_sweep) {
  const auto part = [&](size_t p, Range rows) { return factor.panels[p].slice(0, rows.begin, rows.end); };
  return {columns, slab_rows(panels_of(factor), columns, part), factor, is_for_sweep};
}

}  // namespace isobath::quant
