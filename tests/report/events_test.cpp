#include <gtest/gtest.h>
#include <unistd.h>

#include <fstream>
#include <isobath/core/error.hpp>
#include <isobath/report/events.hpp>
#include <nlohmann/json.hpp>
#include <regex>

namespace isobath::report {
namespace {

namespace fs = std::filesystem;

class Events : public testing::Test {
 protected:
  void SetUp() override {
    directory_ = fs::temp_directory_path() / ("isobath-events-" + std::to_string(::getpid()));
    fs::create_directories(directory_);
    path_ = directory_ / "events.jsonl";
  }
  void TearDown() override { fs::remove_all(directory_); }

  [[nodiscard]] std::vector<std::string> lines() const {
    std::vector<std::string> found;
    std::ifstream file(path_);
    for (std::string line; std::getline(file, line);) found.push_back(line);
    return found;
  }

  fs::path directory_, path_;
};

TEST_F(Events, EachEventIsOneJsonLineWithTimeAndName) {
  EventLog log(path_);
  log.write("block", {{"block", 7}, {"module", "up\nproj"}});
  log.write("end", {});

  const auto found = lines();  // while the log is open: each line was flushed

  ASSERT_EQ(found.size(), 2U);
  const auto first = nlohmann::json::parse(found[0]);
  EXPECT_EQ(first["event"], "block");
  EXPECT_EQ(first["block"], 7);
  EXPECT_EQ(first["module"], "up\nproj");
  const std::regex kIso("\\d{4}-\\d\\d-\\d\\dT\\d\\d:\\d\\d:\\d\\d\\.\\d{3}Z");
  EXPECT_TRUE(std::regex_match(first["time"].get<std::string>(), kIso)) << first["time"];
  EXPECT_EQ(found[0].find("{\"time\":"), 0U);
  EXPECT_EQ(nlohmann::json::parse(found[1])["event"], "end");
}

TEST_F(Events, ASecondRunAppends) {
  EventLog(path_).write("first", {});
  EventLog(path_).write("second", {});

  EXPECT_EQ(lines().size(), 2U);
}

TEST_F(Events, AHalfWrittenLineOfAKilledRunStaysAlone) {
  std::ofstream(path_) << "{\"time\":\"20";

  EventLog(path_).write("after", {});

  const auto found = lines();
  ASSERT_EQ(found.size(), 2U);
  EXPECT_EQ(nlohmann::json::parse(found[1])["event"], "after");
}

TEST_F(Events, AClosedLogWritesNothing) {
  EventLog log;
  log.write("block", {{"block", 1}});

  EXPECT_TRUE(fs::is_empty(directory_));
}

TEST_F(Events, AnUnwritablePlaceIsAnIoErrorNamingThePath) {
  try {
    EventLog log(directory_ / "absent" / "events.jsonl");
    ADD_FAILURE() << "expected an IoError";
  } catch (const IoError& error) {
    EXPECT_NE(std::string(error.what()).find("absent/events.jsonl"), std::string::npos) << error.what();
  }
}

TEST_F(Events, FieldsThatAreNoObjectAreADefect) {
  EventLog log(path_);
  EXPECT_THROW(log.write("x", nlohmann::json::array({1})), InternalError);
}

}  // namespace
}  // namespace isobath::report
