#include <ATen/ATen.h>

#include <isobath/allocate/quadratic.hpp>
#include <isobath/core/error.hpp>

namespace isobath::allocate {
namespace {

constexpr int64_t kFolds = 4;

}  // namespace

double held_out_loss(const Scores& scores, const Candidates& candidates, const Choose& choose) {
  const int64_t n = scores.n_sequences();
  ISOBATH_CHECK(n >= kFolds, "{} sequences cannot be dealt to {} folds", n, kFolds);
  const at::Tensor sequences = at::arange(n, at::kLong), fold = sequences.remainder(kFolds);
  double sum = 0;
  for (int64_t held = 0; held < kFolds; ++held) {
    const at::Tensor is_held = fold == held;
    const Scores train = scores.of_sequences(sequences.masked_select(is_held.logical_not())),
                 test = scores.of_sequences(sequences.masked_select(is_held)).without_prior();
    sum += estimate_loss(test, candidates)(choose(estimate_loss(train, candidates)));
  }
  return sum / static_cast<double>(kFolds);
}

}  // namespace isobath::allocate
