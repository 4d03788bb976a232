#include <gtest/gtest.h>
#include <unistd.h>

#include <fstream>
#include <isobath/core/host_memory.hpp>

namespace isobath {
namespace {

namespace fs = std::filesystem;

// A membership file and a tree of limits, as Linux shows them.
class MemoryLimit : public ::testing::Test {
 protected:
  void SetUp() override {
    root_ = fs::temp_directory_path() / ("isobath-host-memory-" + std::to_string(getpid()));
    fs::create_directories(root_);
  }
  void TearDown() override { fs::remove_all(root_); }

  void write(const std::string& path, const std::string& text) {
    fs::create_directories((root_ / path).parent_path());
    std::ofstream(root_ / path) << text;
  }
  [[nodiscard]] int64_t found(const std::string& membership) {
    write("membership", membership);
    return memory_limit_bytes(root_ / "membership", root_ / "groups");
  }

  fs::path root_;
};

TEST_F(MemoryLimit, OfVersion2IsTheLowestOfTheGroupAndItsParents) {
  write("groups/memory.max", "max\n");
  write("groups/slurm/memory.max", "5000\n");
  write("groups/slurm/job_7/memory.max", "3000\n");
  write("groups/slurm/job_7/step_0/memory.max", "max\n");
  EXPECT_EQ(found("0::/slurm/job_7/step_0\n"), 3000);
  EXPECT_EQ(found("0::/slurm\n"), 5000);
  EXPECT_EQ(found("0::/\n"), 0);
}

TEST_F(MemoryLimit, OfVersion1IsReadBelowTheMemoryController) {
  write("groups/memory/memory.limit_in_bytes", "9223372036854771712\n");
  write("groups/memory/slurm/uid_0/memory.limit_in_bytes", "4096\n");
  EXPECT_EQ(found("9:cpu:/else\n4:hugetlb,memory:/slurm/uid_0\n0::/\n"), 4096);
}

TEST_F(MemoryLimit, IsAbsentWhereNothingTells) {
  EXPECT_EQ(found(""), 0);
  EXPECT_EQ(found("no colons\n4:memory:/not/here\n"), 0);
  EXPECT_EQ(memory_limit_bytes(root_ / "absent", root_), 0);
}

TEST(HostMemory, IsNoMoreThanTheMachineHas) {
  EXPECT_GT(host_memory_bytes(), 0);
  EXPECT_LE(host_memory_bytes(), static_cast<int64_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGE_SIZE));
}

}  // namespace
}  // namespace isobath
