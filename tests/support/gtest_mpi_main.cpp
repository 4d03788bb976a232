// main() of every test: rank 0 prints, the failures of the other ranks are gathered and printed by it at the
// end, and all ranks return the same code.
#include <gtest/gtest.h>

#include <chrono>
#include <cstdio>
#include <isobath/comm/runtime.hpp>
#include <isobath/comm/watchdog.hpp>
#include <isobath/core/log.hpp>

#include "support/mpi_environment.hpp"

namespace {

// Below the shortest CTest time limit, so that a rank left alone is named before the test is killed.
constexpr std::chrono::seconds kWaitLimit{40};

const isobath::comm::Communicator* test_world = nullptr;

class FailureCollector : public ::testing::EmptyTestEventListener {
 public:
  [[nodiscard]] const std::string& text() const { return text_; }

 private:
  void OnTestStart(const ::testing::TestInfo& test) override {
    test_ = fmt::format("{}.{}", test.test_suite_name(), test.name());
  }
  void OnTestEnd(const ::testing::TestInfo&) override { test_ = kNoTest; }
  // GoogleTest holds its lock here: asking UnitTest for the current test would wait for ever.
  void OnTestPartResult(const ::testing::TestPartResult& result) override {
    if (!result.failed()) return;
    text_ += fmt::format("{} at {}:{}\n{}\n", test_, result.file_name() ? result.file_name() : "?",
                         result.line_number(), result.message());
  }
  static constexpr const char* kNoTest = "(outside a test)";
  std::string test_ = kNoTest;
  std::string text_;
};

}  // namespace

namespace isobath::testing {

const comm::Communicator& world() {
  ISOBATH_CHECK(test_world != nullptr, "world() is valid only while tests run");
  return *test_world;
}

}  // namespace isobath::testing

int main(int argc, char** argv) {
  isobath::comm::Runtime runtime(argc, argv);
  ::testing::InitGoogleTest(&argc, argv);
  const isobath::comm::Communicator& world = runtime.world();
  test_world = &world;
  isobath::log::configure(world.rank(), world.size(), isobath::log::Level::info);
  isobath::comm::Watchdog::configure(kWaitLimit);

  ::testing::TestEventListeners& listeners = ::testing::UnitTest::GetInstance()->listeners();
  auto* failures = new FailureCollector;  // owned by GoogleTest after Append
  listeners.Append(failures);
  if (world.rank() != 0) {
    delete listeners.Release(listeners.default_result_printer());
    delete listeners.Release(listeners.default_xml_generator());
  }
  const int result = RUN_ALL_TESTS();

  const std::vector<std::string> texts = world.all_gather(failures->text());
  const int32_t worst = world.all_reduce<int32_t>(result, isobath::comm::Reduce::max);
  if (world.rank() == 0) {
    for (size_t rank = 1; rank < texts.size(); ++rank) {
      if (!texts[rank].empty()) std::printf("[rank %zu] %s", rank, texts[rank].c_str());
    }
    std::fflush(stdout);
  }
  return worst;
}
