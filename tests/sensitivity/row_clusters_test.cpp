#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <isobath/core/error.hpp>
#include <isobath/sensitivity/row_clusters.hpp>
#include <numeric>
#include <sensitivity/near.hpp>
#include <set>

namespace isobath::sensitivity {
namespace {

using testing::relative_error;

std::vector<int64_t> rows_of(const RowGroups& groups, size_t k) {
  const int64_t* order = groups.order.const_data_ptr<int64_t>();
  return {order + groups.ranges[k].begin, order + groups.ranges[k].end};
}

// Every row once, groups consecutive and not empty, rows ascending in each, groups by their first rows.
void expect_partition(const RowGroups& groups, int64_t n_rows, int64_t n_groups) {
  ASSERT_EQ(std::ssize(groups.ranges), n_groups);
  ASSERT_EQ(groups.order.sizes(), at::IntArrayRef{n_rows});
  int64_t begin = 0, first = -1;
  std::set<int64_t> seen;
  for (size_t k = 0; k < groups.ranges.size(); ++k) {
    EXPECT_EQ(groups.ranges[k].begin, begin);
    EXPECT_GT(groups.ranges[k].size(), 0);
    begin = groups.ranges[k].end;
    const std::vector<int64_t> rows = rows_of(groups, k);
    EXPECT_TRUE(std::is_sorted(rows.begin(), rows.end()));
    EXPECT_GT(rows.front(), first);
    first = rows.front();
    seen.insert(rows.begin(), rows.end());
  }
  EXPECT_EQ(begin, n_rows);
  EXPECT_EQ(std::ssize(seen), n_rows);
}

// Row j of `n_rows` points along direction j % 3, of any size, with noise.
at::Tensor planted(int64_t n_rows) {
  at::manual_seed(3);
  const at::Tensor centres = at::randn({3, 16}, at::kDouble);
  at::Tensor profiles = at::empty({n_rows, 16}, at::kDouble);
  for (int64_t row = 0; row < n_rows; ++row)
    profiles[row] = (centres[row % 3] + 0.05 * at::randn({16}, at::kDouble)) * std::pow(10.0, row % 5 - 8);
  return profiles;
}

TEST(ClusterRows, FindsPlantedClustersWhateverTheSizeOfGradients) {
  const at::Tensor profiles = planted(60);
  for (const uint64_t seed : {0, 1, 2}) {
    const RowGroups groups = cluster_rows(profiles, 3, seed, 5);

    expect_partition(groups, 60, 3);
    for (size_t k = 0; k < 3; ++k)
      for (const int64_t row : rows_of(groups, k)) EXPECT_EQ(row % 3, static_cast<int64_t>(k));
  }
}

TEST(ClusterRows, HasTheSameResultForAnyNumberOfThreads) {
  at::manual_seed(4);
  const at::Tensor profiles = at::randn({700, kProfileLength});
  const int before = at::get_num_threads();
  at::set_num_threads(1);
  const RowGroups one = cluster_rows(profiles, 4, 7, 1);
  at::set_num_threads(3);
  const RowGroups three = cluster_rows(profiles, 4, 7, 1);
  at::set_num_threads(before);

  expect_partition(one, 700, 4);
  EXPECT_TRUE(at::equal(one.order, three.order));
  EXPECT_EQ(one.ranges, three.ranges);
}

TEST(ClusterRows, OfOneGroupAreAllRowsAndOfAsManyAsRowsOneEach) {
  const at::Tensor profiles = planted(12);

  expect_partition(cluster_rows(profiles, 1, 0, 0), 12, 1);
  const RowGroups each = cluster_rows(profiles, 12, 0, 0);

  expect_partition(each, 12, 12);
  EXPECT_EQ(deviation_within(profiles, each), 0.0);
}

TEST(ClusterRows, OfEqualOrEmptyRowsLeaveNoGroupEmpty) {
  expect_partition(cluster_rows(at::ones({10, 4}), 3, 0, 0), 10, 3);
  expect_partition(cluster_rows(at::zeros({10, 4}), 3, 0, 0), 10, 3);
  at::Tensor two = at::ones({10, 4});
  two[7][0] = -1;
  expect_partition(cluster_rows(two, 4, 0, 0), 10, 4);
}

TEST(ClusterRows, OfNonFiniteGradientsNameTheRow) {
  at::Tensor profiles = at::ones({10, 4});
  profiles[6][2] = std::numeric_limits<float>::quiet_NaN();
  profiles[8][0] = std::numeric_limits<float>::infinity();
  try {
    (void)cluster_rows(profiles, 2, 0, 0);
    FAIL();
  } catch (const NumericError& error) {
    EXPECT_NE(std::string(error.what()).find("row 6"), std::string::npos) << error.what();
  }
  EXPECT_THROW((void)cluster_rows(at::ones({3, 4}), 4, 0, 0), InternalError);
}

TEST(ClusterRows, LeavesLittleMoreThanTheBestOfAllPartitions) {
  at::manual_seed(5);
  const at::Tensor profiles = at::randn({9, 3}, at::kDouble);
  const at::Tensor points = profiles / profiles.norm(2, 1, true);
  double best = std::numeric_limits<double>::infinity();
  // Every cut in two, by hand.
  for (int subset = 1; subset < 1 << 8; ++subset) {
    double deviation = 0;
    for (const int side : {0, 1}) {
      std::vector<int64_t> rows;
      for (int64_t row = 0; row < 9; ++row)
        if ((subset >> row & 1) == side) rows.push_back(row);
      const at::Tensor of_side = points.index_select(0, at::tensor(rows, at::kLong));
      deviation += (of_side - of_side.mean(0, true)).square().sum().item<double>();
    }
    best = std::min(best, deviation);
  }
  double found = std::numeric_limits<double>::infinity();
  for (const uint64_t seed : {0, 1, 2, 3, 4}) {
    const double deviation = deviation_within(profiles, cluster_rows(profiles, 2, seed, 0));
    EXPECT_GE(deviation, best - 1e-9);
    found = std::min(found, deviation);
  }
  EXPECT_NEAR(found, best, 1e-9);
}

TEST(DeviationWithin, IsThatOfNormalisedProfilesByHand) {
  const at::Tensor profiles = at::tensor({2., 0., 0., 3., 5., 0., 0., 0.}).view({4, 2});
  // Points (1, 0), (0, 1), (1, 0), (0, 0); rows 0 and 3: mean (½, 0), deviation ½; rows 1 and 2: 1.
  const RowGroups groups{.order = at::tensor({0, 3, 1, 2}, at::kLong), .ranges = {{0, 2}, {2, 4}}};

  EXPECT_NEAR(deviation_within(profiles, groups), 1.5, 1e-12);
}

// Inner products of sketches are those of the squared gradients, within what 64 signs can tell.
TEST(RowProfiles, KeepTheCosinesOfSquaredGradients) {
  at::manual_seed(6);
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    const at::Tensor gradient = (at::randn({2, 150, 5}) * 1e-6).to(dtype);

    const at::Tensor profiles = row_profiles(gradient, 4, 9);

    ASSERT_EQ(profiles.sizes(), (at::IntArrayRef{5, kProfileLength}));
    EXPECT_EQ(profiles.scalar_type(), at::kFloat);
    const at::Tensor squares = gradient.to(at::kDouble).square().flatten(0, 1);
    const at::Tensor norms = squares.norm(2, 0);
    const at::Tensor cosines = squares.t().mm(squares) / norms.outer(norms);
    const at::Tensor found = profiles.to(at::kDouble).mm(profiles.to(at::kDouble).t()) / kProfileLength;
    // Standard error of a product of two sketches: at most √(2/64).
    EXPECT_LT((found / norms.outer(norms) - cosines).abs().max().item<double>(), 4 * std::sqrt(2.0 / 64));
  }
}

TEST(RowProfiles, OfMicrobatchesAddUp) {
  at::manual_seed(7);
  const at::Tensor gradient = at::randn({3, 20, 6});

  const at::Tensor whole = row_profiles(gradient, 10, 1);
  const at::Tensor parts =
      row_profiles(gradient.slice(0, 0, 1), 10, 1) + row_profiles(gradient.slice(0, 1, 3), 11, 1);

  EXPECT_LT(relative_error(parts, whole), 1e-5);
  // Another seed, other signs.
  EXPECT_GT(relative_error(row_profiles(gradient, 10, 2), whole), 0.1);
}

}  // namespace
}  // namespace isobath::sensitivity
