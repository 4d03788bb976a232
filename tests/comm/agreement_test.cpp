#include <gtest/gtest.h>

#include <ATen/ATen.h>

#include <isobath/comm/communicator.hpp>

#include "support/mpi_environment.hpp"

namespace isobath::comm {
namespace {

using isobath::testing::world;

struct Outcome {
  std::string message;
  ExitCode code = ExitCode::ok;
};

template <class Agreement>
Outcome outcome_of(Agreement&& agreement) {
  try {
    agreement();
  } catch (const AgreedFailure& failure) {
    return {failure.what(), failure.code()};
  }
  return {};
}

void expect_same_on_all_ranks(const std::string& text) {
  for (const std::string& other : world().all_gather(text)) EXPECT_EQ(other, text);
}

TEST(Agreement, NothingIsRaisedWhenNoRankFails) {
  EXPECT_NO_THROW(world().agree("", ExitCode::data));
  int n_runs = 0;
  EXPECT_NO_THROW(world().agree_on([&] { ++n_runs; }));
  EXPECT_EQ(n_runs, 1);
}

TEST(Agreement, EveryFailingRankIsListedOnEveryRankWithTheLargestCode) {
  const bool fails = world().rank() % 2 == 1 || world().size() == 1;
  const Outcome outcome = outcome_of([&] {
    world().agree(fails ? fmt::format("missing shard {}", world().rank()) : "",
                  world().rank() == 1 ? ExitCode::config : ExitCode::data);
  });
  expect_same_on_all_ranks(outcome.message);
  for (int rank = 0; rank < world().size(); ++rank) {
    const std::string line = fmt::format("rank {} ({}): missing shard {}", rank, world().host(), rank);
    const bool listed = outcome.message.find(line) != std::string::npos;
    EXPECT_EQ(listed, rank % 2 == 1 || world().size() == 1) << outcome.message;
  }
  // Ranks 1 (config) and 3 (data), where they exist; on one rank, rank 0 (data).
  EXPECT_EQ(outcome.code, world().size() == 1 || world().size() > 3 ? ExitCode::data : ExitCode::config);
}

TEST(Agreement, EqualTextsAreMerged) {
  const Outcome outcome =
      outcome_of([] { world().agree("cannot open a.yaml: no such file", ExitCode::config); });
  const char* const who[] = {"", "", "ranks 0 and 1", "ranks 0, 1 and 2", "ranks 0-3"};
  if (world().size() > 1) {
    EXPECT_EQ(outcome.message, fmt::format("{}: cannot open a.yaml: no such file", who[world().size()]));
  } else {
    EXPECT_EQ(outcome.message, fmt::format("rank 0 ({}): cannot open a.yaml: no such file", world().host()));
  }
  EXPECT_EQ(outcome.code, ExitCode::config);
}

TEST(Agreement, AnErrorOfOneRankIsRaisedOnAllWithItsContext) {
  const Outcome outcome = outcome_of([] {
    world().agree_on([] {
      if (world().rank() != world().size() - 1) return;
      try {
        throw DataError("token 9 of 8");
      } catch (...) {
        std::throw_with_nested(std::runtime_error("reading the calibration set"));
      }
    });
  });
  expect_same_on_all_ranks(outcome.message);
  EXPECT_NE(outcome.message.find("reading the calibration set -> token 9 of 8"), std::string::npos)
      << outcome.message;
  EXPECT_EQ(outcome.code, ExitCode::data);
}

TEST(Agreement, ErrorsThatAreNotOursCountAsInternal) {
  const Outcome standard = outcome_of([] { world().agree_on([] { throw std::out_of_range("index 3"); }); });
  EXPECT_EQ(standard.code, ExitCode::internal);
  EXPECT_NE(standard.message.find("index 3"), std::string::npos);
  const Outcome unknown = outcome_of([] { world().agree_on([] { throw 42; }); });
  EXPECT_EQ(unknown.code, ExitCode::internal);
  const Outcome silent = outcome_of([] { world().agree_on([] { throw std::runtime_error(""); }); });
  EXPECT_EQ(silent.code, ExitCode::internal);
}

TEST(Agreement, ATensorErrorComesWithoutItsStackAndIsMerged) {
  const Outcome outcome =
      outcome_of([] { world().agree_on([] { static_cast<void>(at::ones({2}) + at::ones({3})); }); });
  EXPECT_EQ(outcome.code, ExitCode::internal);
  EXPECT_EQ(outcome.message.find("frame #"), std::string::npos) << outcome.message;
  EXPECT_EQ(outcome.message.find('\n'), std::string::npos) << "not merged: " << outcome.message;
}

TEST(Agreement, AllRanksGoOnTogetherAfterAFailure) {
  static_cast<void>(outcome_of([] { world().agree("bad", ExitCode::io); }));
  EXPECT_EQ(world().all_reduce<int32_t>(1, Reduce::sum), world().size());
}

TEST(Agreement, AnyIsTrueWhenOneRankSaysSo) {
  EXPECT_TRUE(world().any(world().rank() == world().size() - 1));
  EXPECT_FALSE(world().any(false));
}

}  // namespace
}  // namespace isobath::comm
