#include <gtest/gtest.h>

#include <isobath/report/timeline.hpp>
#include <nlohmann/json.hpp>

namespace isobath::report {
namespace {

TEST(Timeline, HoldsEverySpanOfEveryRankAsChromeReadsIt) {
  trace::start();
  {
    const trace::Span outer("block", 7);
    const trace::Span inner("covariance");
  }
  const std::vector<trace::Event> events = trace::stop();
  ASSERT_EQ(events.size(), 2U);
  const auto json = nlohmann::json::parse(
      timeline({timeline_of_rank(0, "a", events), timeline_of_rank(1, "b \"quoted\"", {})}));
  const auto& all = json["traceEvents"];
  ASSERT_EQ(all.size(), 4U);  // two names, two spans
  EXPECT_EQ(all[0]["args"]["name"], "rank 0 (a)");
  EXPECT_EQ(all[1]["name"], "covariance");
  EXPECT_FALSE(all[1].contains("args"));
  EXPECT_EQ(all[2]["name"], "block");
  EXPECT_EQ(all[2]["args"]["number"], 7);
  EXPECT_EQ(all[3]["pid"], 1);
  const double begin = all[2]["ts"], inner_begin = all[1]["ts"];
  EXPECT_LE(begin, inner_begin);
  EXPECT_LE(inner_begin + all[1]["dur"].get<double>(), begin + all[2]["dur"].get<double>());
}

TEST(Timeline, RecordsNothingUnlessStarted) {
  { const trace::Span span("unseen"); }
  EXPECT_FALSE(trace::is_on());
  EXPECT_TRUE(trace::stop().empty());
  // A span that began before the recording is not part of it.
  {
    const trace::Span early("early");
    trace::start();
  }
  EXPECT_TRUE(trace::stop().empty());
}

}  // namespace
}  // namespace isobath::report
