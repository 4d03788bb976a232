#include <glpk.h>

#include <algorithm>
#include <cmath>
#include <isobath/allocate/knapsack.hpp>
#include <isobath/core/error.hpp>
#include <limits>
#include <numeric>

#include "every_selection.hpp"

namespace isobath::allocate {
namespace {

// Near-optimal is enough for a start, and a proof of the last digits can take for ever; a count of nodes,
// unlike a time limit, ends at the same place on every machine.
constexpr double kRelativeGap = 1e-6;
constexpr int kMaxNodes = 20'000;

void check(const Candidates& candidates, std::span<const double> loss) {
  ISOBATH_CHECK(std::ssize(loss) == candidates.size(), "{} losses for {} candidates", loss.size(),
                candidates.size());
  ISOBATH_CHECK(std::all_of(loss.begin(), loss.end(), [](double value) { return std::isfinite(value); }),
                "losses of candidates must be finite");
}

void stop_at_last_node(glp_tree* tree, void* /*info*/) {
  int n_active = 0, n_current = 0, n_total = 0;
  glp_ios_tree_size(tree, &n_active, &n_current, &n_total);
  if (n_total > kMaxNodes) glp_ios_terminate(tree);
}

/// A GLPK problem: one column a candidate, one row a set (= 1), and the budget as the last row, in units of
/// the costs' greatest common divisor so that the solver's tolerances stay below one unit.
struct Program {
  glp_prob* problem = nullptr;
  Candidates candidates;
  int64_t unit = 1;

  explicit Program(const Candidates& given) : candidates(given) {
    ISOBATH_CHECK(given.first.size() >= 2 && given.first.front() == 0 && given.first.back() == given.size(),
                  "candidates must cover {} costs", given.size());
    ISOBATH_CHECK(cost_of(given, cheapest(given)) <= given.budget,
                  "a budget of {} is below the cheapest selection", given.budget);
    unit = std::accumulate(given.cost.begin(), given.cost.end(), int64_t{0}, std::gcd<int64_t, int64_t>);
    problem = glp_create_prob();
    glp_set_obj_dir(problem, GLP_MIN);
    const int n_sets = static_cast<int>(given.n_sets());
    glp_add_rows(problem, n_sets + 1);
    glp_add_cols(problem, static_cast<int>(given.size()));
    set_budget(given.budget / unit);
    for (int set = 0; set < n_sets; ++set) {
      glp_set_row_bnds(problem, set + 1, GLP_FX, 1, 1);
      for (int64_t k = given.first[static_cast<size_t>(set)]; k < given.first[static_cast<size_t>(set) + 1];
           ++k) {
        const int column = static_cast<int>(k) + 1;
        glp_set_col_bnds(problem, column, GLP_DB, 0, 1);
        const int rows[] = {0, set + 1, n_sets + 1};  // GLPK counts from 1
        const double values[] = {0, 1, static_cast<double>(given.cost[static_cast<size_t>(k)] / unit)};
        glp_set_mat_col(problem, column, 2, rows, values);
      }
    }
  }
  ~Program() { glp_delete_prob(problem); }
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;

  void set_budget(int64_t units) {
    glp_set_row_bnds(problem, static_cast<int>(candidates.n_sets()) + 1, GLP_UP, 0,
                     static_cast<double>(units));
  }

  void set_loss(std::span<const double> loss) {
    // Scaled: the solver's tolerances are meant for values near one.
    double largest = 0;
    for (const double value : loss) largest = std::max(largest, std::abs(value));
    const double scale = largest > 0 ? 1 / largest : 1;
    for (size_t k = 0; k < loss.size(); ++k)
      glp_set_obj_coef(problem, static_cast<int>(k) + 1, loss[k] * scale);
  }

  void solve_linear() {
    glp_smcp parameters;
    glp_init_smcp(&parameters);
    parameters.msg_lev = GLP_MSG_OFF;
    int failure = glp_simplex(problem, &parameters);
    if (failure != 0 || glp_get_status(problem) != GLP_OPT) {
      // A basis left by another objective can be numerically poor: once more from the start.
      glp_std_basis(problem);
      failure = glp_simplex(problem, &parameters);
    }
    if (failure != 0 || glp_get_status(problem) != GLP_OPT)
      fail<NumericError>("allocation: the simplex method failed (GLPK code {}, status {}) on {} sets",
                         failure, glp_get_status(problem), candidates.n_sets());
  }

  [[nodiscard]] Selection solve_integer() {
    for (int64_t k = 1; k <= candidates.size(); ++k) glp_set_col_kind(problem, static_cast<int>(k), GLP_BV);
    glp_iocp parameters;
    glp_init_iocp(&parameters);
    parameters.msg_lev = GLP_MSG_OFF;
    parameters.mip_gap = kRelativeGap;
    parameters.cov_cuts = GLP_ON;
    parameters.cb_func = stop_at_last_node;
    solve_linear();
    // Cover cuts announce themselves whatever msg_lev says.
    const int terminal = glp_term_out(GLP_OFF);
    const int failure = glp_intopt(problem, &parameters);
    glp_term_out(terminal);
    const int status = glp_mip_status(problem);
    if (status != GLP_OPT && status != GLP_FEAS)
      fail<NumericError>("allocation: branch and cut found no selection (GLPK code {}, status {}) of {} sets",
                         failure, status, candidates.n_sets());
    Selection selection;
    for (int64_t set = 0; set < candidates.n_sets(); ++set) {
      const auto first = candidates.first[static_cast<size_t>(set)],
                 last = candidates.first[static_cast<size_t>(set) + 1];
      int64_t taken = first;
      for (int64_t k = first; k < last; ++k)
        if (glp_mip_col_val(problem, static_cast<int>(k) + 1) > 0.5) taken = k;
      selection.push_back(taken);
    }
    return selection;
  }
};

}  // namespace

int64_t cost_of(const Candidates& candidates, const Selection& selection) {
  int64_t cost = 0;
  for (const int64_t taken : selection) cost += candidates.cost[static_cast<size_t>(taken)];
  return cost;
}

double sum_of(const Selection& selection, std::span<const double> loss) {
  double sum = 0;
  for (const int64_t taken : selection) sum += loss[static_cast<size_t>(taken)];
  return sum;
}

Selection cheapest(const Candidates& candidates) {
  Selection selection;
  for (int64_t set = 0; set < candidates.n_sets(); ++set) {
    const auto begin = candidates.cost.begin();
    const auto lowest = std::min_element(begin + candidates.first[static_cast<size_t>(set)],
                                         begin + candidates.first[static_cast<size_t>(set) + 1]);
    selection.push_back(lowest - begin);
  }
  return selection;
}

struct KnapsackRelaxation::State {
  explicit State(const Candidates& candidates) : program(candidates) {}
  Program program;
};

KnapsackRelaxation::KnapsackRelaxation(const Candidates& candidates)
    : state_(std::make_unique<State>(candidates)) {}
KnapsackRelaxation::~KnapsackRelaxation() = default;
KnapsackRelaxation::KnapsackRelaxation(KnapsackRelaxation&&) noexcept = default;

std::vector<double> KnapsackRelaxation::minimise(std::span<const double> loss) {
  Program& program = state_->program;
  check(program.candidates, loss);
  program.set_loss(loss);
  program.solve_linear();
  std::vector<double> shares;
  for (size_t k = 1; k <= loss.size(); ++k)
    shares.push_back(std::clamp(glp_get_col_prim(program.problem, static_cast<int>(k)), 0.0, 1.0));
  return shares;
}

Selection solve_knapsack(const Candidates& candidates, std::span<const double> loss) {
  check(candidates, loss);
  // A tolerance of the solver may let a selection exceed the budget by a hair: then ask for a unit less.
  const Selection floor = cheapest(candidates);
  for (Candidates tightened = candidates;;
       tightened.budget -= std::max<int64_t>(1, tightened.budget / 1'000'000)) {
    if (cost_of(candidates, floor) > tightened.budget) return floor;
    Program program(tightened);
    program.set_loss(loss);
    Selection selection = program.solve_integer();
    if (cost_of(candidates, selection) <= candidates.budget) return selection;
  }
}

Selection brute_force_knapsack(const Candidates& candidates, std::span<const double> loss) {
  check(candidates, loss);
  Selection best;
  double least = std::numeric_limits<double>::infinity();
  for_each_selection(candidates, [&](const Selection& selection) {
    const double value = sum_of(selection, loss);
    if (value >= least) return;
    least = value;
    best = selection;
  });
  return best;
}

}  // namespace isobath::allocate
