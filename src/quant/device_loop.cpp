#include "device_loop.hpp"

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>

#include <isobath/kernels/device.hpp>
#include <isobath/quant/solver.hpp>

#include "candidates.hpp"
#include "device_rules.hpp"

namespace isobath::quant {
namespace {

static_assert(cuda::kBlockColumns == kBlock);

/// Importances as a fit takes them: relative to the largest of the group.
at::Tensor relative_in_groups(const at::Tensor& importance, int64_t width) {
  const at::Tensor groups = importance.view({-1, width}), largest = groups.amax(1, /*keepdim=*/true);
  return at::where(largest > 0, groups / largest, at::ones({}, at::kFloat)).flatten();
}

}  // namespace

DeviceLoop::DeviceLoop(const at::Tensor& w, const Factor& factor, const GridSpec& spec, int64_t tile_rows)
    : spec_(spec),
      device_(w.device()),
      n_rows_(w.size(0)),
      n_columns_(w.size(1)),
      tile_rows_(tile_rows),
      blocks_{n_columns_, n_columns_ / n_groups(n_columns_, spec), is_permuted(factor.order)},
      largest_curvature_(factor.curvature.max().item<double>()),
      added_(factor.damping * factor.mean),
      factors_(at::tensor(shrink_factors(spec)).to(device_)),
      rules_(device_rules(spec, factors_)),
      order_(factor.order.to(device_)),
      importance_(relative_in_groups(remaining_curvature(factor), blocks_.width).to(device_)),
      curvature_((factor.curvature / largest_curvature_).to(at::kFloat).to(device_)) {
  ISOBATH_CHECK(factor.n_columns() == n_columns_, "factor of {} columns for a weight of {}",
                factor.n_columns(), n_columns_);
  ISOBATH_CHECK(n_rows_ > 0 && tile_rows > 0 && tile_rows % kRowTile == 0, "{} rows in tiles of {}", n_rows_,
                tile_rows);
  const c10::DeviceGuard guard(device_);
  const at::Tensor rows = w.to(at::kFloat);
  if (!at::isfinite(rows).all().item<bool>()) check_weights(rows.cpu());
  const at::Tensor original = rows.t().contiguous().masked_fill(factor.dead.to(device_).unsqueeze(1), 0);
  const int64_t groups = n_columns_ / blocks_.width;
  const auto of = [&](at::ScalarType dtype) { return at::TensorOptions().dtype(dtype).device(device_); };
  errors_ = blocks_.is_permuted ? original.index_select(0, order_) : original;
  codes_ = at::empty({n_columns_, n_rows_}, of(at::kChar));
  scale_ = at::empty({groups, n_rows_}, of(at::kFloat));
  zero_ = at::empty({groups, n_rows_}, of(at::kChar));
  sums_ = at::zeros({2, n_rows_}, of(at::kDouble));
  feedback_ = at::empty({kBlock, kBlock}, of(at::kFloat));
  settled_ = at::empty({kBlock, n_rows_}, of(at::kFloat));
  shifts_ = at::empty_like(settled_);
  if (blocks_.is_permuted) fit(original, 0, groups);
}

void DeviceLoop::advance(const at::Tensor& panel) {
  const c10::DeviceGuard guard(device_);
  panels_.push(panel.to(device_));
  while (next_ < n_columns_) {
    const int64_t end = blocks_.end_of(next_);
    // A wide group is fitted on the current values of all its columns.
    const int64_t needed = blocks_.starts_wide_group(next_) && next_ > 0 ? next_ + blocks_.width : end;
    if (needed > panels_.end()) break;
    solve_block({next_, end});
    next_ = end;
  }
  panels_.drop_before(next_);
}

QuantizedMatrix DeviceLoop::take() {
  ISOBATH_CHECK(next_ == n_columns_, "{} of {} columns are solved", next_, n_columns_);
  return {spec_, codes_.t().contiguous(), scale_.t().contiguous().to(spec_.storage), zero_.t().contiguous()};
}

at::Tensor DeviceLoop::objectives() const {
  const at::Tensor sums = sums_.cpu();
  const auto* squares = sums.const_data_ptr<double>();
  const auto* norms = squares + n_rows_;
  at::Tensor values = at::zeros({(n_rows_ + tile_rows_ - 1) / tile_rows_}, at::kDouble);
  for (int64_t tile = 0; tile < values.size(0); ++tile) {
    double twice = 0;
    for (int64_t row = tile * tile_rows_; row < std::min(n_rows_, (tile + 1) * tile_rows_); ++row)
      twice += largest_curvature_ * squares[row] - added_ * norms[row];
    values[tile] = std::max(0.0, 0.5 * twice);
  }
  return values;
}

cuda::Grids DeviceLoop::grids_of(int64_t group) {
  return {.scale = scale_.mutable_data_ptr<float>() + group * n_rows_,
          .zero = zero_.mutable_data_ptr<int8_t>() + group * n_rows_};
}

cuda::Block DeviceLoop::view(at::Tensor& targets, Range block) {
  return {.n_rows = n_rows_,
          .n_columns = static_cast<int>(block.size()),
          .targets = targets.mutable_data_ptr<float>(),
          .errors = errors_.mutable_data_ptr<float>() + block.begin * n_rows_,
          .feedback = feedback_.const_data_ptr<float>(),
          .curvature = curvature_.const_data_ptr<float>() + block.begin};
}

/// Fits groups on their columns [n_groups · width, R].
void DeviceLoop::fit(const at::Tensor& columns, int64_t first_group, int64_t n_groups) {
  kernels::check_launch(cuda::fit_groups(columns.const_data_ptr<float>(), n_rows_, n_groups, blocks_.width,
                                         importance_.const_data_ptr<float>() + first_group * blocks_.width,
                                         rules_, grids_of(first_group), kernels::current_stream(device_)),
                        "the fit of grids");
}

void DeviceLoop::load_feedback(Range block) {
  panels_.for_each_in(block, [&](Range part, const at::Tensor& columns) {
    const int64_t n_earlier = part.end - block.begin;
    feedback_.slice(0, part.begin - block.begin, n_earlier)
        .slice(1, 0, n_earlier)
        .copy_(columns.slice(0, block.begin, part.end).t());
  });
}

void DeviceLoop::solve_block(Range block) {
  if (blocks_.starts_wide_group(block.begin)) enter_wide_group(block.begin);
  load_feedback(block);
  at::Tensor targets = current(block);
  const kernels::Stream stream = kernels::current_stream(device_);
  const cuda::Block columns = view(targets, block);
  const cuda::Rounded rounded{.codes = codes_.mutable_data_ptr<int8_t>(),
                              .order = order_.const_data_ptr<int64_t>() + block.begin,
                              .width = blocks_.width,
                              .squares = sums_.mutable_data_ptr<double>(),
                              .norms = sums_.mutable_data_ptr<double>() + n_rows_};
  const bool fits_here = !blocks_.is_permuted && blocks_.width <= kBlock;
  const int n = columns.n_columns, step = fits_here ? static_cast<int>(blocks_.width) : n;
  for (int begin = 0; begin < n; begin += step) {
    const int end = begin + step;
    if (fits_here) {
      kernels::check_launch(cuda::settle_columns(columns, begin, end, settled_.mutable_data_ptr<float>(),
                                                 shifts_.mutable_data_ptr<float>(), stream),
                            "the settling of columns");
      fit(settled_.slice(0, begin, end), (block.begin + begin) / blocks_.width, 1);
    }
    kernels::check_launch(cuda::solve_columns(columns, begin, end, rules_, grids_of(0), rounded, stream),
                          "the column loop");
  }
}

void DeviceLoop::enter_wide_group(int64_t begin) {
  // Nothing precedes the first group: its columns are the weights themselves.
  wide_ = begin == 0 ? at::Tensor() : with_feedback({begin, begin + blocks_.width}, {0, begin});
  fit(begin == 0 ? errors_.slice(0, 0, blocks_.width) : settled_group(begin), begin / blocks_.width, 1);
}

/// A wide group settled block by block, [width, R].
at::Tensor DeviceLoop::settled_group(int64_t begin) {
  at::Tensor settled = at::empty_like(wide_), shifts = at::empty_like(wide_);
  const Range group{begin, begin + blocks_.width};
  for (int64_t first = begin; first < group.end; first += kBlock) {
    const Range block{first, std::min(first + kBlock, group.end)};
    const int64_t at = first - begin;
    load_feedback(block);
    at::Tensor targets = wide_.slice(0, at, block.end - begin).clone();
    if (at > 0) add_products(shifts.slice(0, 0, at), {begin, first}, block, targets);
    kernels::check_launch(cuda::settle_columns(view(targets, block), 0, static_cast<int>(block.size()),
                                               settled.mutable_data_ptr<float>() + at * n_rows_,
                                               shifts.mutable_data_ptr<float>() + at * n_rows_,
                                               kernels::current_stream(device_)),
                          "the settling of columns");
  }
  return settled;
}

/// The targets of a block, with the errors of all columns before it. [n, R].
at::Tensor DeviceLoop::current(Range block) const {
  if (!wide_.defined()) return with_feedback(block, {0, block.begin});
  const int64_t group = block.begin / blocks_.width * blocks_.width;
  at::Tensor targets = wide_.slice(0, block.begin - group, block.end - group).clone();
  if (block.begin > group)
    add_products(errors_.slice(0, group, block.begin), {group, block.begin}, block, targets);
  return targets;
}

at::Tensor DeviceLoop::with_feedback(Range columns, Range from) const {
  at::Tensor targets = errors_.slice(0, columns.begin, columns.end).clone();
  if (from.size() > 0) add_products(errors_.slice(0, from.begin, from.end), from, columns, targets);
  return targets;
}

/// targets [columns, R] += (R diag(R)⁻¹)ᵀ errors, errors [from, R].
void DeviceLoop::add_products(const at::Tensor& errors, Range from, Range columns,
                              at::Tensor& targets) const {
  panels_.for_each_in(columns, [&](Range part, const at::Tensor& panel) {
    at::Tensor sum = targets.slice(0, part.begin - columns.begin, part.end - columns.begin);
    kernels::add_device_product(sum, panel.slice(0, from.begin, from.end), errors);
  });
}

}  // namespace isobath::quant
