#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <isobath/core/error.hpp>
#include <isobath/io/scratch_file.hpp>

#include "io/temporary_directory.hpp"

namespace isobath::io {
namespace {

using test::TemporaryDirectory;

TEST(ScratchFile, GivesBackWhatItTookInAnyOrder) {
  const TemporaryDirectory directory;
  ScratchFile file(directory / "new");
  const at::Tensor a = at::randn({3, 5}), b = at::arange(7).to(at::kBFloat16);
  const int64_t at_a = file.append(a), at_b = file.append(b);

  at::Tensor read_b = at::empty({7}, at::kBFloat16), read_a = at::empty({3, 5});
  file.read(read_b, at_b);
  file.read(read_a, at_a);

  EXPECT_TRUE(at::equal(read_a, a));
  EXPECT_TRUE(at::equal(read_b, b));
}

TEST(ScratchFile, HasNoNameThatACrashCouldLeaveBehind) {
  const TemporaryDirectory directory;
  ScratchFile file(directory.path());
  file.append(at::zeros({4}));
  EXPECT_TRUE(directory.names().empty());
}

TEST(ScratchFile, ReadingBehindTheEndIsAnErrorThatNamesTheFile) {
  const TemporaryDirectory directory;
  ScratchFile file(directory.path());
  file.append(at::zeros({4}));
  at::Tensor longer = at::empty({5});
  const std::string message = test::message_of<IoError>([&] { file.read(longer, 0); });
  EXPECT_NE(message.find("isobath-scratch-"), std::string::npos) << message;
  EXPECT_NE(message.find("expected 20 bytes at 0, found 16"), std::string::npos) << message;
}

TEST(ScratchFile, ADirectoryThatCannotBeMadeIsAnError) {
  const TemporaryDirectory directory;
  test::write_bytes(directory / "file", "");
  EXPECT_THROW(ScratchFile(directory / "file"), IoError);
}

}  // namespace
}  // namespace isobath::io
