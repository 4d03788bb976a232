#include <isobath/pipeline/drift.hpp>

#include <ATen/ATen.h>

#include <isobath/pipeline/share.hpp>
#include <isobath/sensitivity/token_weights.hpp>

namespace isobath::pipeline {

std::vector<data::Microbatch> probe_microbatches(const data::ShardPlan& shards, int64_t n_sequences) {
  const std::vector<data::Microbatch>& all = shards.microbatches();
  const auto n_all = std::ssize(all);
  // Microbatches at a shard's end may be smaller, so their number is found by trying.
  for (int64_t n = 1;; ++n) {
    std::vector<data::Microbatch> probe;
    int64_t n_held = 0;
    for (int64_t i = 0; i < n; ++i) {
      probe.push_back(all[static_cast<size_t>(i * n_all / n)]);
      n_held += probe.back().sequences.size();
    }
    if (n_held >= n_sequences || n == n_all) return probe;
  }
}

double token_weight_cosine(const at::Tensor& in_use, const at::Tensor& now,
                           const config::Sensitivity& sensitivity) {
  ISOBATH_CHECK(in_use.dim() == 3 && in_use.sizes() == now.sizes(), "token weights of two shapes");
  double sum = 0;
  for (int64_t k = 0; k < in_use.size(2); ++k) {
    const auto as_used = [&](const at::Tensor& raw) {
      const at::Tensor group = raw.select(2, k);
      return sensitivity::robust(group, sensitivity::clip_threshold(group, sensitivity.clip_quantile),
                                 sensitivity.exponent)
          .to(at::kDouble);
    };
    const at::Tensor a = as_used(in_use), b = as_used(now);
    // One factor a tensor first: D of a long model spans many orders of magnitude.
    const double norms = a.norm().item<double>() * b.norm().item<double>();
    if (norms > 0) sum += (a * b).sum().item<double>() / norms;
  }
  return sum / static_cast<double>(in_use.size(2));
}

Drift measure_drift(const Session& session, int64_t first_block, const TokenWeightsOf& in_use,
                    const TokenWeightsOf& now) {
  const int64_t n_blocks = session.model().n_blocks - first_block;
  at::Tensor cosines = at::zeros({n_blocks, model::kProjections}, at::kDouble);
  session.world().agree_on([&] {
    // Every replica of a stage holds the same; one of them tells.
    if (session.grid->replica() != 0) return;
    const Range mine = session.my_blocks();
    for (int64_t block = std::max(first_block, mine.begin); block < mine.end; ++block) {
      const auto before = in_use(block), after = now(block);
      for (size_t p = 0; p < before.size(); ++p)
        cosines[block - first_block][static_cast<int64_t>(p)] =
            token_weight_cosine(before[p], after[p], session.config.sensitivity);
    }
  });
  share_disjoint(cosines, session.world());
  Drift drift{
      .cosine = cosines.mean().item<double>(), .smallest = cosines.min().item<double>(), .module = {}};
  const auto place = cosines.argmin().item<int64_t>();
  drift.module = model::module_name(first_block + place / model::kProjections,
                                    static_cast<model::Projection>(place % model::kProjections));
  return drift;
}

}  // namespace isobath::pipeline
