#include <gtest/gtest.h>

#include <isobath/core/partition.hpp>

namespace isobath {
namespace {

TEST(Partition, GivesTheSharesOfTheTableInItsHeader) {
  EXPECT_EQ(partition(16, 3, 0), (Range{0, 6}));
  EXPECT_EQ(partition(16, 3, 1), (Range{6, 11}));
  EXPECT_EQ(partition(16, 3, 2), (Range{11, 16}));
  EXPECT_EQ(partition(2, 4, 0), (Range{0, 1}));
  EXPECT_EQ(partition(2, 4, 1), (Range{1, 2}));
  EXPECT_EQ(partition(2, 4, 2), (Range{2, 2}));
  EXPECT_EQ(partition(2, 4, 3), (Range{2, 2}));
}

TEST(Partition, CoversEveryItemOnceAndOwnerOfAgrees) {
  for (int64_t n_items = 0; n_items < 40; ++n_items) {
    for (int64_t n_parts = 1; n_parts < 12; ++n_parts) {
      int64_t next = 0;
      for (int64_t part = 0; part < n_parts; ++part) {
        const Range share = partition(n_items, n_parts, part);
        EXPECT_EQ(share.begin, next);
        EXPECT_LE(share.size() - n_items / n_parts, 1);
        for (int64_t item = share.begin; item < share.end; ++item) {
          EXPECT_EQ(owner_of(item, n_items, n_parts), part);
          EXPECT_TRUE(share.contains(item));
        }
        EXPECT_FALSE(share.contains(share.end));
        next = share.end;
      }
      EXPECT_EQ(next, n_items);
    }
  }
}

TEST(Partition, RefusesWhatDoesNotExist) {
  EXPECT_THROW(static_cast<void>(partition(4, 0, 0)), InternalError);
  EXPECT_THROW(static_cast<void>(partition(4, 2, 2)), InternalError);
  EXPECT_THROW(static_cast<void>(owner_of(4, 4, 2)), InternalError);
}

}  // namespace
}  // namespace isobath
