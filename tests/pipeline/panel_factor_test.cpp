#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <isobath/comm/device_communicator.hpp>
#include <isobath/core/error.hpp>
#include <isobath/pipeline/panel_factor.hpp>
#include <isobath/pipeline/share.hpp>
#include <isobath/quant/solver.hpp>
#include <limits>

#include "quant/problem.hpp"
#include "support/mpi_environment.hpp"

namespace isobath::pipeline {
namespace {

using isobath::testing::world;

constexpr int64_t kColumns = 150, kRows = 200, kShards = 5, kTokens = 90;
/// f32 sums of a few hundred products, and their factor, against the same in f64.
constexpr double kTolerance = 1e-4;

/// Rows of a logical shard, correlated and of unequal size; every third token counts half.
std::pair<at::Tensor, at::Tensor> shard_rows(int64_t shard) {
  auto generator = quant::test_generator(static_cast<uint64_t>(100 + shard));
  auto mixing = quant::test_generator(7);
  const at::Tensor mix =
      at::eye(kColumns) + at::randn({kColumns, kColumns}, mixing) / std::sqrt(static_cast<double>(kColumns));
  at::Tensor weights = at::ones({kTokens});
  weights.slice(0, 0, kTokens, 3).fill_(0.5);
  at::Tensor x = at::randn({kTokens, kColumns}, generator).mm(mix);
  x.select(1, 11).zero_();  // a dead column
  return {x, weights};
}

struct Result {
  quant::Factor factor;
  at::Tensor codes, scale, objectives;
};

/// H of all shards in panels, its factor, and the codes of all rows, by the ranks of `comm`.
Result run(const comm::Communicator& comm, int64_t width, double damping, int first_owner,
           c10::Device device = c10::Device(c10::kCPU)) {
  const comm::DeviceCommunicator devices(comm, device);
  const PanelLayout layout{.columns = quant::column_panels(kColumns, width),
                           .first_owner = first_owner % comm.size(),
                           .n_ranks = comm.size()};
  std::vector<int> owners;
  for (int64_t shard = 0; shard < kShards; ++shard)
    owners.push_back(static_cast<int>(owner_of(shard, kShards, comm.size())));
  const quant::FactorSpec spec{.damping = damping, .panel_width = width};
  std::vector<at::Tensor> panels =
      sum_panels(layout, owners, comm, device,
                 [&](const VisitRows& visit, const std::function<void(int64_t)>& close_shard) {
                   for (int64_t shard = 0; shard < kShards; ++shard) {
                     if (owners[static_cast<size_t>(shard)] != comm.rank()) continue;
                     const auto [x, weights] = shard_rows(shard);
                     visit(x.to(device), {}, weights.to(device));
                     close_shard(shard);
                   }
                 });
  Result result;
  result.factor = quant::factor_of_diagonal(share_diagonal(panels, layout, comm), spec);
  EXPECT_TRUE(factorize_panels(std::move(panels), layout, result.factor, devices));

  auto generator = quant::test_generator(3);
  const at::Tensor w = (at::randn({kRows, kColumns}, generator) / 30).to(device);
  const quant::GridSpec grid{.bits = 3, .group = 50};
  const int64_t height = quant::tile_rows(kRows), n_tiles = (kRows + height - 1) / height;
  const Range tiles = partition(n_tiles, comm.size(), comm.rank());
  const Range rows{tiles.begin * height, std::min(kRows, tiles.end * height)};
  std::optional<quant::RowSolver> solver;
  if (rows.begin < rows.end) solver.emplace(w.slice(0, rows.begin, rows.end), result.factor, grid, height);
  for (size_t p = 0; p < layout.columns.size(); ++p) {
    const at::Tensor panel = share_panel(result.factor, layout, p, devices);
    if (solver) solver->advance(panel);
    result.factor.panels[p] = panel;
  }
  result.codes = at::zeros({kRows, kColumns}, at::kChar);
  result.scale = at::zeros({kRows, kColumns / grid.group}, grid.storage);
  result.objectives = at::zeros({n_tiles}, at::kDouble);
  if (solver) {
    result.objectives.slice(0, tiles.begin, tiles.end).copy_(solver->objectives());
    const quant::QuantizedMatrix own = solver->take();
    result.codes.slice(0, rows.begin, rows.end).copy_(own.codes);
    result.scale.slice(0, rows.begin, rows.end).copy_(own.scale);
  }
  for (at::Tensor* part : {&result.codes, &result.scale, &result.objectives}) share_disjoint(*part, comm);
  return result;
}

TEST(PanelFactor, EveryNumberOfRanksGivesTheBytesOfOne) {
  const comm::Communicator alone = world().split(world().rank(), 0);
  for (const int64_t width : {16, 37, 64, 150})
    for (const int first_owner : {0, 2}) {
      SCOPED_TRACE(fmt::format("panels of {}, first owner {}", width, first_owner));
      const Result mine = run(alone, width, 0.01, 0), ours = run(world(), width, 0.01, first_owner);
      EXPECT_TRUE(at::equal(mine.factor.curvature, ours.factor.curvature));
      for (size_t p = 0; p < mine.factor.panels.size(); ++p)
        EXPECT_TRUE(at::equal(mine.factor.panels[p], ours.factor.panels[p])) << "panel " << p;
      EXPECT_TRUE(at::equal(mine.codes, ours.codes));
      EXPECT_TRUE(at::equal(mine.scale, ours.scale));
      EXPECT_TRUE(at::equal(mine.objectives, ours.objectives));
    }
}

/// H of all shards, f64.
at::Tensor whole_covariance() {
  at::Tensor h = at::zeros({kColumns, kColumns}, at::kDouble);
  for (int64_t shard = 0; shard < kShards; ++shard) {
    const auto [x, weights] = shard_rows(shard);
    h += x.to(at::kDouble).t().mm((x * weights.unsqueeze(1)).to(at::kDouble));
  }
  return h;
}

TEST(PanelFactor, TheRootIsThatOfTheWholeMatrix) {
  const at::Tensor h = whole_covariance();
  const quant::Factor whole = quant::factorize(h.to(at::kFloat), {.damping = 0.02});
  const at::Tensor expected = quant::upper_root(whole);
  const double largest = expected.abs().max().item<double>();

  for (const int64_t width : {16, 64}) {
    const Result spread = run(world(), width, 0.02, 1);
    EXPECT_TRUE(at::allclose(quant::upper_root(spread.factor), expected, 0, kTolerance * largest));
    EXPECT_TRUE(at::equal(spread.factor.dead, whole.dead));
    EXPECT_NEAR(spread.factor.mean / whole.mean, 1, kTolerance);
  }
}

TEST(PanelFactor, DevicesGiveTheRootOfTheHostAndTheSameBytesForEveryNumberOfRanks) {
  const c10::Device device = comm::select_device("auto", world().node());
  if (!device.is_cuda()) GTEST_SKIP() << "no CUDA device on this machine";
  const comm::Communicator alone = world().split(world().rank(), 0);
  const Result mine = run(alone, 64, 0.02, 0, device), ours = run(world(), 64, 0.02, 1, device);
  EXPECT_TRUE(at::equal(mine.factor.curvature, ours.factor.curvature));
  EXPECT_TRUE(at::equal(mine.codes, ours.codes));
  EXPECT_TRUE(at::equal(mine.objectives, ours.objectives));
  const at::Tensor expected =
      quant::upper_root(quant::factorize(whole_covariance().to(at::kFloat), {.damping = 0.02}));
  EXPECT_TRUE(at::allclose(quant::upper_root(ours.factor), expected, 0,
                           kTolerance * expected.abs().max().item<double>()));
}

TEST(PanelFactor, AllRanksAgreeThatAMatrixIsNotPositiveDefinite) {
  // Eigenvalues 1 ± 1.05 in the columns of the first panel, which is factorized last.
  const PanelLayout layout{.columns = quant::column_panels(8, 2), .n_ranks = world().size()};
  const quant::FactorSpec spec{.damping = 0.01, .panel_width = 2};
  const auto panels = [&] {
    at::Tensor h = at::eye(8);
    h[0][1] = 1.05F;
    std::vector<at::Tensor> own(layout.columns.size());
    for (size_t p = 0; p < own.size(); ++p)
      if (layout.owner(p) == world().rank())
        own[p] =
            h.slice(0, 0, layout.columns[p].end).slice(1, layout.columns[p].begin, layout.columns[p].end);
    return own;
  };
  const comm::DeviceCommunicator hosts(world(), c10::Device(c10::kCPU));
  quant::Factor factor = quant::factor_of_diagonal(share_diagonal(panels(), layout, world()), spec);

  EXPECT_FALSE(factorize_panels(panels(), layout, factor, hosts));
  EXPECT_TRUE(quant::raise_damping(factor, spec));
  EXPECT_TRUE(factorize_panels(panels(), layout, factor, hosts));
  EXPECT_NEAR(factor.damping, 0.1, 1e-12);
  EXPECT_EQ(factor.n_fallbacks, 1);
}

TEST(PanelFactor, ANonFiniteEntryIsNamedByItsPlaceInTheWhole) {
  at::Tensor columns = at::ones({20, 4});
  columns[3][1] = std::numeric_limits<float>::infinity();
  try {
    quant::check_finite(columns, 16);
    FAIL() << "expected NumericError";
  } catch (const NumericError& error) {
    EXPECT_NE(std::string(error.what()).find("row 3, column 17"), std::string::npos) << error.what();
  }
}

}  // namespace
}  // namespace isobath::pipeline
