#include "device_refiner.hpp"

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>

#include <isobath/kernels/device.hpp>
#include <isobath/quant/solver.hpp>

#include "column_loop.hpp"
#include "device_rules.hpp"

namespace isobath::quant {

DeviceRefiner::DeviceRefiner(const QuantizedMatrix& start, const at::Tensor& target, const Factor& factor)
    : spec_(start.spec),
      device_(target.device()),
      target_(target),
      n_rows_(target.size(0)),
      n_columns_(target.size(1)),
      width_(n_columns_ / n_groups(n_columns_, spec_)),
      is_permuted_(is_permuted(factor.order)),
      rules_(device_rules(spec_, {})),
      order_(factor.order.to(device_)),
      live_(factor.dead.index_select(0, factor.order).logical_not().to(at::kFloat).to(device_)),
      codes_(start.codes.to(device_).t().index_select(0, order_)),
      scale_(start.scale.to(device_, at::kFloat).t().contiguous()),
      zero_(start.zero.to(device_).t().contiguous()),
      errors_(at::zeros({n_columns_, n_rows_}, at::TensorOptions(at::kFloat).device(device_))),
      moved_(at::zeros({}, at::TensorOptions(at::kBool).device(device_))) {}

DeviceRefiner::Columns DeviceRefiner::columns_of(const Slab& slab) const {
  const Range range = slab.columns;
  Columns columns{.range = range,
                  .groups = order_.slice(0, range.begin, range.end).div(width_, "floor"),
                  .is_live = live_.slice(0, range.begin, range.end).unsqueeze(1),
                  .values = {},
                  .steps = {}};
  columns.steps = codes_.slice(0, range.begin, range.end).to(at::kFloat) -
                  zero_.index_select(0, columns.groups).to(at::kFloat);
  columns.steps.mul_(columns.is_live);
  columns.values = (columns.steps * scale_.index_select(0, columns.groups)).to(spec_.storage).to(at::kFloat);
  return columns;
}

void DeviceRefiner::load(const Slab& slab) {
  const c10::DeviceGuard guard(device_);
  const Columns columns = columns_of(slab);
  const Range range = columns.range;
  const at::Tensor wanted = is_permuted_ ? target_.index_select(1, order_.slice(0, range.begin, range.end))
                                         : target_.slice(1, range.begin, range.end);
  const at::Tensor difference = columns.values.clone().sub_(wanted.to(at::kFloat).t()).mul_(columns.is_live);
  add(slab.rows.to(device_), difference, range.begin);
}

void DeviceRefiner::sweep(const Slab& slab) {
  const c10::DeviceGuard guard(device_);
  Columns columns = columns_of(slab);
  const at::Tensor before = columns.values.clone(), rows = slab.rows.to(device_),
                   curvature = slab.curvature.to(device_);
  at::Tensor gradient = at::zeros_like(before);
  kernels::add_device_product(gradient, rows.t().contiguous(), errors_.slice(0, columns.range.begin));
  move_codes(columns, curvature, gradient);
  if (!is_permuted_) move_grids(columns, curvature, gradient);
  const at::Tensor change = columns.values - before;
  add(rows, change, columns.range.begin);
  moved_.logical_or_(change.ne(0).any());
  codes_.slice(0, columns.range.begin, columns.range.end)
      .copy_(columns.steps + zero_.index_select(0, columns.groups).to(at::kFloat));
  if (columns.range.end < n_columns_) return;
  is_settled_ = !moved_.item<bool>();
  moved_.zero_();
}

void DeviceRefiner::move_codes(Columns& columns, const at::Tensor& curvature, at::Tensor& gradient) {
  const int64_t n_slab = columns.range.size();
  at::Tensor changes = at::empty({kBlock, n_rows_}, gradient.options());
  for (int64_t begin = 0; begin < n_slab; begin += kBlock) {
    const int64_t end = std::min(n_slab, begin + kBlock);
    const cuda::RefinedColumns block{.n_rows = n_rows_,
                                     .n_columns = static_cast<int>(end - begin),
                                     .values = columns.values.mutable_data_ptr<float>() + begin * n_rows_,
                                     .steps = columns.steps.mutable_data_ptr<float>() + begin * n_rows_,
                                     .gradients = gradient.const_data_ptr<float>() + begin * n_rows_,
                                     .changes = changes.mutable_data_ptr<float>(),
                                     .curvature = curvature.const_data_ptr<float>() + begin * (n_slab + 1),
                                     .stride = n_slab};
    const cuda::Grids grids{scale_.mutable_data_ptr<float>(), zero_.mutable_data_ptr<int8_t>()};
    kernels::check_launch(
        cuda::refine_codes(block, order_.const_data_ptr<int64_t>() + columns.range.begin + begin, width_,
                           rules_, grids, kernels::current_stream(device_)),
        "the refinement of codes");
    kernels::add_device_product(gradient, curvature.slice(0, begin, end), changes.slice(0, 0, end - begin));
  }
}

void DeviceRefiner::move_grids(Columns& columns, const at::Tensor& curvature, at::Tensor& gradient) {
  const int64_t n_slab = columns.range.size(), first = columns.range.begin;
  at::Tensor changes = at::empty({std::min(width_, n_slab), n_rows_}, gradient.options());
  // Groups of which all columns are in the slab.
  for (int64_t group = (first + width_ - 1) / width_; (group + 1) * width_ <= columns.range.end; ++group) {
    const int64_t begin = group * width_ - first;
    const cuda::RefinedColumns own{.n_rows = n_rows_,
                                   .n_columns = static_cast<int>(width_),
                                   .values = columns.values.mutable_data_ptr<float>() + begin * n_rows_,
                                   .steps = columns.steps.mutable_data_ptr<float>() + begin * n_rows_,
                                   .gradients = gradient.const_data_ptr<float>() + begin * n_rows_,
                                   .changes = changes.mutable_data_ptr<float>(),
                                   .curvature = curvature.const_data_ptr<float>() + begin * (n_slab + 1),
                                   .stride = n_slab};
    const cuda::Grids grids{scale_.mutable_data_ptr<float>() + group * n_rows_,
                            zero_.mutable_data_ptr<int8_t>() + group * n_rows_};
    kernels::check_launch(cuda::refine_grid(own, live_.const_data_ptr<float>() + first + begin, rules_, grids,
                                            kernels::current_stream(device_)),
                          "the refinement of grids");
    kernels::add_device_product(gradient, curvature.slice(0, begin, begin + width_), changes);
  }
}

void DeviceRefiner::add(const at::Tensor& slab_rows, const at::Tensor& difference, int64_t first_column) {
  at::Tensor errors = errors_.slice(0, first_column);
  kernels::add_device_product(errors, slab_rows, difference);
}

QuantizedMatrix DeviceRefiner::matrix() const {
  const at::Tensor places = order_.argsort();
  return {spec_, codes_.index_select(0, places).t().contiguous().cpu(), scale_.t().contiguous().cpu(),
          zero_.t().contiguous().cpu()};
}

at::Tensor DeviceRefiner::errors(Range rows) const {
  return errors_.slice(1, rows.begin, rows.end).contiguous().cpu();
}

}  // namespace isobath::quant
