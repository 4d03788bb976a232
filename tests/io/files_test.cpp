#include <gtest/gtest.h>
#include <sys/stat.h>

#include <isobath/core/error.hpp>
#include <isobath/io/files.hpp>

#include "io/temporary_directory.hpp"

namespace isobath::io {
namespace {

using test::message_of;
using test::TemporaryDirectory;

TEST(Files, WriteTextReplacesTheOldContentAndLeavesNoTemporaryFile) {
  const TemporaryDirectory directory;
  write_text_atomically(directory / "a", "old, and longer");
  write_text_atomically(directory / "a", "new");
  EXPECT_EQ(read_text(directory / "a"), "new");
  EXPECT_EQ(directory.names(), std::set<std::string>{"a"});
}

TEST(Files, WriteTextDoesNotFollowALinkLeftUnderTheTemporaryName) {
  const TemporaryDirectory directory;
  test::write_bytes(directory / "outside", "untouched");
  fs::create_symlink(directory / "outside", directory / "a.tmp");
  write_text_atomically(directory / "a", "new");
  EXPECT_EQ(read_text(directory / "outside"), "untouched");
  EXPECT_EQ(read_text(directory / "a"), "new");
}

TEST(Files, ReadTextRefusesMoreThanTheLimit) {
  const TemporaryDirectory directory;
  test::write_bytes(directory / "a", "0123456789");
  EXPECT_EQ(read_text(directory / "a", 10), "0123456789");
  EXPECT_NE(message_of<DataError>([&] { static_cast<void>(read_text(directory / "a", 9)); }).find("10 bytes"),
            std::string::npos);
}

TEST(Files, ReadTextRefusesAPipeInsteadOfWaitingForIt) {
  const TemporaryDirectory directory;
  ASSERT_EQ(::mkfifo((directory / "pipe").c_str(), 0600), 0);
  EXPECT_NE(
      message_of<IoError>([&] { static_cast<void>(read_text(directory / "pipe")); }).find("regular file"),
      std::string::npos);
}

TEST(Files, AMissingFileIsNamedWithTheReason) {
  const std::string message = message_of<IoError>([] { static_cast<void>(read_text("/nonexistent/file")); });
  EXPECT_NE(message.find("/nonexistent/file"), std::string::npos) << message;
  EXPECT_NE(message.find("No such file"), std::string::npos) << message;
}

TEST(Files, CopyKeepsTheBytesAndReplacesTheTarget) {
  const TemporaryDirectory directory;
  const std::string bytes(100'001, 'x');
  test::write_bytes(directory / "a", bytes);
  test::write_bytes(directory / "b", "old");
  copy_atomically(directory / "a", directory / "b");
  EXPECT_EQ(test::read_bytes(directory / "b"), bytes);
  EXPECT_EQ(directory.names(), (std::set<std::string>{"a", "b"}));
}

TEST(Files, CopyOfAnEmptyFileIsEmpty) {
  const TemporaryDirectory directory;
  test::write_bytes(directory / "a", "");
  copy_atomically(directory / "a", directory / "b");
  EXPECT_EQ(fs::file_size(directory / "b"), 0u);
}

TEST(Files, RenameAndDirectoriesReportWhatIsInTheWay) {
  const TemporaryDirectory directory;
  make_directories(directory / "x" / "y");
  make_directories(directory / "x" / "y");
  EXPECT_TRUE(fs::is_directory(directory / "x" / "y"));
  test::write_bytes(directory / "file", "");
  EXPECT_THROW(make_directories(directory / "file"), IoError);
  EXPECT_THROW(make_directories(directory / "file" / "below"), IoError);
  EXPECT_THROW(rename_durably(directory / "absent", directory / "z"), IoError);
  rename_durably(directory / "file", directory / "x" / "file");
  EXPECT_TRUE(fs::exists(directory / "x" / "file"));
}

TEST(Files, WhatKilledWritersLeftGoesAndNothingElse) {
  const TemporaryDirectory directory;
  for (const char* name : {"config.json.tmp", ".model-00003-of-00005.safetensors.tmp-4087", "config.json",
                           ".hidden", "model.tmp-1"})
    test::write_bytes(directory / name, "x");
  fs::create_directory(directory / "folder.tmp");
  remove_temporaries(directory.path());
  EXPECT_EQ(directory.names(),
            (std::set<std::string>{"config.json", ".hidden", "model.tmp-1", "folder.tmp"}));
}

TEST(Files, FreeBytesAnswersForFilesThatDoNotExistYet) {
  const TemporaryDirectory directory;
  EXPECT_GT(free_bytes(directory / "not" / "yet"), 0);
  EXPECT_GE(free_bytes("relative-and-absent"), 0);
}

}  // namespace
}  // namespace isobath::io
