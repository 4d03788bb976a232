// A full disk (a small tmpfs, where it may be mounted) and a file-size limit (ulimit -f): every writer must
// say so, keep the old file, leave nothing behind, and let the process end normally.
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <sys/mount.h>
#include <sys/resource.h>

#include <csignal>
#include <isobath/core/error.hpp>
#include <isobath/io/files.hpp>
#include <isobath/io/hdf5_file.hpp>
#include <isobath/io/safetensors_writer.hpp>

#include "io/temporary_directory.hpp"

namespace isobath::io {
namespace {

constexpr int64_t kLimitBytes = 256 * 1024;
constexpr int64_t kTooLarge = 4 * kLimitBytes;

/// A directory in which files beyond kLimitBytes cannot be written.
class Disk {
 public:
  virtual ~Disk() = default;
  [[nodiscard]] virtual bool available() const = 0;
};

class SmallTmpfs final : public Disk {
 public:
  explicit SmallTmpfs(fs::path path) : path_(std::move(path)) {
    const std::string options = fmt::format("size={}", kLimitBytes);
    is_mounted_ = ::mount("isobath-test", path_.c_str(), "tmpfs", 0, options.c_str()) == 0;
  }
  ~SmallTmpfs() override {
    if (is_mounted_) ::umount2(path_.c_str(), MNT_DETACH);
  }
  [[nodiscard]] bool available() const override { return is_mounted_; }

 private:
  fs::path path_;
  bool is_mounted_;
};

class FileSizeLimit final : public Disk {
 public:
  FileSizeLimit() : old_handler_(std::signal(SIGXFSZ, SIG_IGN)) {
    ::getrlimit(RLIMIT_FSIZE, &old_);
    const rlimit limit{static_cast<rlim_t>(kLimitBytes), old_.rlim_max};
    is_set_ = ::setrlimit(RLIMIT_FSIZE, &limit) == 0;
  }
  ~FileSizeLimit() override {
    ::setrlimit(RLIMIT_FSIZE, &old_);
    std::signal(SIGXFSZ, old_handler_);
  }
  [[nodiscard]] bool available() const override { return is_set_; }

 private:
  void (*old_handler_)(int);
  rlimit old_{};
  bool is_set_;
};

class FullDisk : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    test::write_bytes(elsewhere_ / "large", std::string(kTooLarge, 'x'));
    if (std::string(GetParam()) == "tmpfs") {
      disk_ = std::make_unique<SmallTmpfs>(directory_.path());
    } else {
      disk_ = std::make_unique<FileSizeLimit>();
    }
    if (!disk_->available()) GTEST_SKIP() << "SKIPPED: this user may not mount a tmpfs";
    write_text_atomically(directory_ / "out", "old content");
  }

  template <class Action>
  void expect_full(Action&& action) {
    const std::string message = test::message_of<IoError>(action);
    EXPECT_NE(message.find(directory_.path().string()), std::string::npos) << message;
    EXPECT_NE(message.find("bytes are needed"), std::string::npos) << message;
    EXPECT_NE(message.find("bytes are free"), std::string::npos) << message;
    EXPECT_TRUE(message.find("No space left") != std::string::npos ||
                message.find("File too large") != std::string::npos)
        << message;
    EXPECT_EQ(test::read_bytes(directory_ / "out"), "old content");
    EXPECT_EQ(directory_.names(), std::set<std::string>{"out"});
  }

  test::TemporaryDirectory directory_, elsewhere_;
  std::unique_ptr<Disk> disk_;
};

TEST_P(FullDisk, StopsWriteText) {
  expect_full([&] { write_text_atomically(directory_ / "out", std::string(kTooLarge, 'x')); });
}

TEST_P(FullDisk, StopsCopy) {
  expect_full([&] { copy_atomically(elsewhere_ / "large", directory_ / "out"); });
}

TEST_P(FullDisk, StopsTheSafetensorsWriter) {
  expect_full([&] { write_safetensors(directory_ / "out", {{"a", at::zeros({kTooLarge}, at::kByte)}}, {}); });
}

TEST_P(FullDisk, StopsTheHdf5WriterInOneLargeDataset) {
  expect_full([&] {
    Hdf5Writer writer(directory_ / "out");
    writer.write("large", at::zeros({kTooLarge}, at::kByte));
    writer.commit();
  });
}

TEST_P(FullDisk, StopsTheHdf5WriterInManySmallDatasets) {
  constexpr int64_t kSmall = 1000;
  expect_full([&] {
    Hdf5Writer writer(directory_ / "out");
    for (int64_t i = 0; i < kTooLarge / kSmall; ++i)
      writer.write(fmt::format("group/small{}", i), at::zeros({kSmall}, at::kByte));
    writer.commit();
  });
}

TEST_P(FullDisk, AFailedHdf5WriteIsRememberedAtCommit) {
  expect_full([&] {
    Hdf5Writer writer(directory_ / "out");
    EXPECT_THROW(writer.write("large", at::zeros({kTooLarge}, at::kByte)), IoError);
    EXPECT_THROW(writer.write("small", at::zeros({1}, at::kByte)), IoError);
    writer.commit();
  });
}

TEST_P(FullDisk, SmallFilesStillFitAfterwards) {
  EXPECT_THROW(write_safetensors(directory_ / "out", {{"a", at::zeros({kTooLarge}, at::kByte)}}, {}),
               IoError);
  Hdf5Writer writer(directory_ / "small.h5");
  writer.write("t", at::arange(10, at::kInt));
  writer.commit();
  EXPECT_TRUE(at::equal(Hdf5Reader(directory_ / "small.h5").read("t"), at::arange(10, at::kInt)));
}

INSTANTIATE_TEST_SUITE_P(Disk, FullDisk, ::testing::Values("tmpfs", "limit"),
                         [](const auto& parameter) { return std::string(parameter.param); });

}  // namespace
}  // namespace isobath::io
