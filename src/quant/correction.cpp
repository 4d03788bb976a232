#include <isobath/quant/correction.hpp>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <isobath/core/error.hpp>

namespace isobath::quant {

FactorSpec ridge_spec(double ridge) {
  ISOBATH_CHECK(ridge > 0, "ridge {}", ridge);
  constexpr double kLargestRidge = 1e6;
  return {.damping = ridge, .max_damping = std::max(ridge, kLargestRidge)};
}

void check_ridge(const Factor& factor) {
  if (factor.failed)
    fail<NumericError>(
        "H is not positive definite even with a diagonal of {:g} added; it holds NaN or is not a covariance",
        factor.damping * factor.mean);
}

CorrectedRows::CorrectedRows(const at::Tensor& w, int64_t strip_rows)
    : n_rows_(w.size(0)), strip_rows_(strip_rows), device_(w.device()) {
  ISOBATH_CHECK(strip_rows > 0 && strip_rows % kRowTile == 0, "strips of {} rows", strip_rows);
  const at::TensorOptions options = at::TensorOptions(at::kFloat).device(device_);
  for (int64_t row = 0; row < n_rows_; row += strip_rows) {
    const int64_t n = std::min(strip_rows, n_rows_ - row);
    // Missing rows are zeros, so that every strip runs the same operations on the same shapes.
    weights_.push_back(at::zeros({w.size(1), strip_rows}, options));
    weights_.back().slice(1, 0, n).copy_(w.slice(0, row, row + n).t());
    products_.push_back(at::empty({w.size(1), strip_rows}, options));
  }
}

template <class Visit>
void CorrectedRows::for_each_strip(const Visit& visit) {
  const auto some = [&](int64_t begin, int64_t end) {
    for (int64_t strip = begin; strip < end; ++strip) visit(static_cast<size_t>(strip));
  };
  // A device has one queue of work.
  if (device_.is_cpu())
    at::parallel_for(0, std::ssize(products_), 1, some);
  else
    some(0, std::ssize(products_));
}

void CorrectedRows::add_residual(const at::Tensor& rows, double share) {
  ISOBATH_CHECK(rows.dim() == 1 && rows.size(0) == n_rows_, "{} rows of the residual for {} of w",
                rows.numel(), n_rows_);
  residual_rows_ = rows.to(device_);
  residual_share_ = share;
}

void CorrectedRows::multiply(const at::Tensor& c, Range columns) {
  const int64_t n_channels = weights_.front().size(0);
  const at::Tensor whole = c.to(device_), own = whole.slice(0, 0, n_channels);
  const at::Tensor residual =
      residual_rows_.defined() ? whole.index_select(0, residual_rows_ + n_channels) : at::Tensor();
  for_each_strip([&](size_t strip) {
    at::Tensor product = products_[strip].slice(0, columns.begin, columns.end);
    at::mm_out(product, own.t(), weights_[strip]);
    if (!residual.defined()) return;
    const int64_t begin = static_cast<int64_t>(strip) * strip_rows_,
                  end = std::min(n_rows_, begin + strip_rows_);
    product.slice(1, 0, end - begin).add_(residual.slice(0, begin, end).t(), residual_share_);
  });
}

void CorrectedRows::substitute_back(const at::Tensor& factor_panel) {
  if (solution_.empty()) {
    weights_.clear();
    for (const at::Tensor& product : products_) solution_.push_back(product.clone());
  }
  const at::Tensor panel = factor_panel.to(device_);
  const int64_t end = panel.size(0), begin = end - panel.size(1);
  for_each_strip([&](size_t strip) {
    at::Tensor own = solution_[strip].slice(0, begin, end);
    own.copy_(at::linalg_solve_triangular(panel.slice(0, begin), own, /*upper=*/true, /*left=*/true,
                                          /*unitriangular=*/true));
    if (begin > 0) solution_[strip].slice(0, 0, begin).addmm_(panel.slice(0, 0, begin), own, 1, -1);
  });
}

void CorrectedRows::substitute_forward(const at::Tensor& factor_panel, const at::Tensor& curvature) {
  const at::Tensor panel = factor_panel.to(device_);
  const int64_t end = panel.size(0), begin = end - panel.size(1);
  const at::Tensor divisor = curvature.slice(0, begin, end).to(device_, at::kFloat).unsqueeze(1);
  for_each_strip([&](size_t strip) {
    at::Tensor own = solution_[strip].slice(0, begin, end);
    own.div_(divisor);
    if (begin > 0) own.addmm_(panel.slice(0, 0, begin).t(), solution_[strip].slice(0, 0, begin), 1, -1);
    own.copy_(at::linalg_solve_triangular(panel.slice(0, begin).t(), own, /*upper=*/false, /*left=*/true,
                                          /*unitriangular=*/true));
  });
}

static at::Tensor joined(const std::vector<at::Tensor>& strips, Range rows) {
  const int64_t height = strips.front().size(1);
  at::Tensor whole = at::empty({rows.size(), strips.front().size(0)}, strips.front().options());
  for (int64_t row = rows.begin; row < rows.end; row += height) {
    const int64_t n = std::min(height, rows.end - row);
    whole.slice(0, row - rows.begin, row - rows.begin + n)
        .copy_(strips[static_cast<size_t>(row / height)].slice(1, 0, n).t());
  }
  return whole;
}

at::Tensor CorrectedRows::products(Range rows) const {
  ISOBATH_CHECK(rows.begin % strip_rows_ == 0, "rows from {} on", rows.begin);
  return joined(products_, rows);
}

at::Tensor CorrectedRows::take_solution() {
  const std::vector<at::Tensor> strips = std::move(solution_);
  return joined(strips, {0, n_rows_});
}

at::Tensor gptaq_correction(const at::Tensor& c, const Factor& factor) {
  ISOBATH_CHECK(!factor.failed, "the correction needs a factorization that succeeded");
  const at::Tensor root = upper_root(factor);  // U = R⁻¹
  const at::Tensor ordered = c.to(at::kDouble).index_select(0, factor.order).index_select(1, factor.order);
  const at::Tensor later =
      at::linalg_solve_triangular(root.t(), ordered, /*upper=*/false, /*left=*/false).triu_(1);
  const at::Tensor compensation = at::linalg_solve_triangular(root, later, /*upper=*/true, /*left=*/false);
  const at::Tensor inverse = at::argsort(factor.order);
  return compensation.index_select(0, inverse).index_select(1, inverse).to(at::kFloat).contiguous();
}

at::Tensor corrected(const at::Tensor& w, const at::Tensor& m, double strength) {
  const at::Tensor weights = w.to(at::kFloat);
  return at::addmm(weights, weights, m, 1, strength);
}

double asymmetric_objective(double objective, const at::Tensor& difference, const at::Tensor& products) {
  return objective - (difference * products).sum(at::kDouble).item<double>();
}

}  // namespace isobath::quant
