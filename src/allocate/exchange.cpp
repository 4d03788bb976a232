#include <ATen/ATen.h>

#include <isobath/allocate/quadratic.hpp>
#include <isobath/core/error.hpp>

namespace isobath::allocate {
namespace {

// A move must gain more than rounding moves the sum, or the search could go round in circles.
constexpr double kLeastGain = 1e-12;

/// Another candidate for one set.
struct Move {
  int64_t set, from, to;
  int64_t cost;  ///< change of the stored bits
  double gain;   ///< change of the loss by this move alone
};

class Search {
 public:
  Search(const QuadraticLoss& loss, const Candidates& candidates, Selection start)
      : candidates_(candidates),
        linear_(loss.linear.contiguous()),
        matrix_(loss.curvature.contiguous()),
        selection_(std::move(start)),
        slack_(candidates.budget - cost_of(candidates, selection_)) {
    ISOBATH_CHECK(std::ssize(selection_) == candidates.n_sets() && slack_ >= 0,
                  "the start must take one candidate a set within the budget");
    gradient_ = linear_.clone();
    for (const int64_t taken : selection_) gradient_.add_(matrix_[taken]);
  }

  Selection run() {
    while (improve()) {
    }
    return selection_;
  }

 private:
  [[nodiscard]] double c(int64_t i, int64_t j) const {
    return matrix_.const_data_ptr<double>()[i * candidates_.size() + j];
  }

  [[nodiscard]] std::vector<Move> moves() const {
    const auto* gradient = gradient_.const_data_ptr<double>();
    std::vector<Move> all;
    for (int64_t set = 0; set < candidates_.n_sets(); ++set) {
      const int64_t from = selection_[static_cast<size_t>(set)];
      for (int64_t to = candidates_.first[static_cast<size_t>(set)];
           to < candidates_.first[static_cast<size_t>(set) + 1]; ++to) {
        if (to == from) continue;
        const double bend = c(to, to) + c(from, from) - 2 * c(to, from);
        all.push_back(
            {set, from, to,
             candidates_.cost[static_cast<size_t>(to)] - candidates_.cost[static_cast<size_t>(from)],
             gradient[to] - gradient[from] + 0.5 * bend});
      }
    }
    return all;
  }

  /// Makes the best move, or pair of moves; false when none gains.
  bool improve() {
    const std::vector<Move> all = moves();
    double best = -kLeastGain * std::abs(value());
    const Move *first = nullptr, *second = nullptr;
    for (size_t a = 0; a < all.size(); ++a) {
      if (all[a].cost <= slack_ && all[a].gain < best) {
        best = all[a].gain;
        first = &all[a];
        second = nullptr;
      }
      for (size_t b = a + 1; b < all.size(); ++b) {
        if (all[b].set == all[a].set || all[a].cost + all[b].cost > slack_) continue;
        const double gain = all[a].gain + all[b].gain + c(all[a].to, all[b].to) - c(all[a].to, all[b].from) -
                            c(all[a].from, all[b].to) + c(all[a].from, all[b].from);
        if (gain >= best) continue;
        best = gain;
        first = &all[a];
        second = &all[b];
      }
    }
    if (first == nullptr) return false;
    make(*first);
    if (second != nullptr) make(*second);
    return true;
  }

  void make(const Move& move) {
    selection_[static_cast<size_t>(move.set)] = move.to;
    slack_ -= move.cost;
    gradient_.add_(matrix_[move.to]).sub_(matrix_[move.from]);
  }

  [[nodiscard]] double value() const {
    double sum = 0;
    for (const int64_t taken : selection_)
      sum += 0.5 * (linear_.const_data_ptr<double>()[taken] + gradient_.const_data_ptr<double>()[taken]);
    return sum;
  }

  const Candidates& candidates_;
  at::Tensor linear_, matrix_;
  Selection selection_;
  int64_t slack_;        // bits left of the budget
  at::Tensor gradient_;  // [n] linear + matrix · selection
};

}  // namespace

Selection exchange(const QuadraticLoss& loss, const Candidates& candidates, Selection start) {
  return Search(loss, candidates, std::move(start)).run();
}

}  // namespace isobath::allocate
