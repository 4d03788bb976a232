#include <gtest/gtest.h>
#include <unistd.h>

#include <isobath/report/progress.hpp>
#include <regex>
#include <thread>

namespace isobath::report {
namespace {

TEST(Progress, DurationsHaveTwoUnitsAtMost) {
  EXPECT_EQ(Progress::format_duration(0), "0.0 s");
  EXPECT_EQ(Progress::format_duration(4.24), "4.2 s");
  EXPECT_EQ(Progress::format_duration(9.97), "10 s");
  EXPECT_EQ(Progress::format_duration(59.6), "1 m 0 s");
  EXPECT_EQ(Progress::format_duration(80), "1 m 20 s");
  EXPECT_EQ(Progress::format_duration(3600 + 120), "1 h 2 m");
  EXPECT_EQ(Progress::format_duration(86400 * 3 + 3600 * 4), "3 d 4 h");
  EXPECT_EQ(Progress::format_duration(-1), "unknown");
  EXPECT_EQ(Progress::format_duration(1.0 / 0.0), "unknown");
}

TEST(Progress, TheLineShowsShareRateAndTimeLeft) {
  Progress progress("quantize", 4, "blocks", 1000, false);
  progress.advance();
  std::this_thread::sleep_for(std::chrono::milliseconds(20));

  const std::string line = progress.line();

  const std::regex expected(
      "quantize (█){6}(░){18} 1/4 blocks  [0-9]+ tokens/s  0\\.[0-9] s  ETA 0\\.[0-9] s");
  EXPECT_TRUE(std::regex_match(line, expected)) << line;
}

TEST(Progress, NothingDoneOrAllDoneHasNoTimeLeft) {
  Progress progress("measure", 2, "microbatches", 0, false);
  EXPECT_EQ(progress.line().find("ETA"), std::string::npos);
  EXPECT_EQ(progress.line().find("tokens/s"), std::string::npos);

  progress.advance(2);

  EXPECT_EQ(progress.line().find("ETA"), std::string::npos);
  EXPECT_NE(progress.line().find("2/2 microbatches"), std::string::npos);
}

/// What `action` writes to stderr, which is a pipe meanwhile and thus no terminal.
std::string stderr_of(const std::function<void()>& action) {
  testing::internal::CaptureStderr();
  action();
  return testing::internal::GetCapturedStderr();
}

TEST(Progress, AwayFromATerminalOnlyNotesAreShownWithTheTimeLeft) {
  const std::string shown = stderr_of([] {
    Progress progress("quantize", 3, "blocks", 0, true);
    progress.advance();
    progress.note("block 1/3");
    progress.advance(2);
    progress.note("block 3/3");
  });

  EXPECT_TRUE(std::regex_search(shown, std::regex("block 1/3  ETA [0-9.]+ s\n"))) << shown;
  EXPECT_TRUE(std::regex_search(shown, std::regex("block 3/3\n"))) << shown;
  EXPECT_EQ(shown.find("█"), std::string::npos);
}

TEST(Progress, OtherRanksAreSilent) {
  const std::string shown = stderr_of([] {
    Progress progress("quantize", 3, "blocks", 0, false);
    progress.advance();
    progress.note("block 1/3");
  });

  EXPECT_EQ(shown, "");
}

}  // namespace
}  // namespace isobath::report
