#include <gtest/gtest.h>

#include <isobath/cli/guarded_main.hpp>

namespace isobath::cli {
namespace {

/// `cause` with the context of two callers around it, as it arrives at the top.
template <class E>
Ending ending_of_nested(const E& cause) {
  try {
    try {
      throw cause;
    } catch (...) {
      std::throw_with_nested(std::runtime_error("block 7"));
    }
  } catch (const std::exception& error) {
    return ending_of(error);
  }
}

TEST(Ending, AnAgreedFailureIsSharedAndKeepsItsCode) {
  const Ending ending = ending_of(AgreedFailure(ExitCode::data, "bad shard"));

  EXPECT_TRUE(ending.is_shared);
  EXPECT_EQ(ending.code, ExitCode::data);
  EXPECT_EQ(ending.message, "bad shard");
}

TEST(Ending, AStopRequestIsSharedAndMeansTryAgain) {
  const Ending ending = ending_of(StopRequested("stopped"));

  EXPECT_TRUE(ending.is_shared);
  EXPECT_EQ(static_cast<int>(ending.code), 75);
}

TEST(Ending, EveryOtherErrorIsThisRanksOwn) {
  EXPECT_FALSE(ending_of(IoError("disk full")).is_shared);
  EXPECT_EQ(static_cast<int>(ending_of(IoError("disk full")).code), 4);
  EXPECT_EQ(static_cast<int>(ending_of(NumericError("nan")).code), 5);
  EXPECT_EQ(static_cast<int>(ending_of(std::bad_alloc()).code), 7);
}

TEST(Ending, ContextKeepsTheKindAndCodeOfTheCause) {
  const Ending own = ending_of_nested(NumericError("activation is nan"));
  EXPECT_FALSE(own.is_shared);
  EXPECT_EQ(own.code, ExitCode::numeric);
  EXPECT_EQ(own.message, "block 7 -> activation is nan");

  EXPECT_TRUE(ending_of_nested(AgreedFailure(ExitCode::io, "disk full")).is_shared);
}

TEST(Ending, CodesAreThoseOfTheDocumentation) {
  EXPECT_EQ(static_cast<int>(ExitCode::config), 2);
  EXPECT_EQ(static_cast<int>(ExitCode::data), 3);
  EXPECT_EQ(static_cast<int>(ExitCode::io), 4);
  EXPECT_EQ(static_cast<int>(ExitCode::numeric), 5);
  EXPECT_EQ(static_cast<int>(ExitCode::checkpoint), 6);
  EXPECT_EQ(static_cast<int>(ExitCode::internal), 7);
  EXPECT_EQ(static_cast<int>(ExitCode::stopped), 75);
}

}  // namespace
}  // namespace isobath::cli
