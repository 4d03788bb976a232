#include <malloc.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <isobath/core/host_memory.hpp>
#include <isobath/core/tensor_memory.hpp>
#include <limits>
#include <string>

namespace isobath {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kNoLimit = std::numeric_limits<int64_t>::max();

// A file that holds a number of bytes; "max", no file or anything else: no limit.
int64_t limit_in(const fs::path& path) {
  std::ifstream file(path);
  int64_t bytes = 0;
  return file >> bytes && bytes > 0 ? bytes : kNoLimit;
}

// The lowest limit of `group` and its parents below `mount`.
int64_t lowest_limit(const fs::path& mount, const fs::path& group, const char* file) {
  int64_t lowest = limit_in(mount / file);
  fs::path place = mount;
  for (const fs::path& part : group.relative_path()) {
    place /= part;
    lowest = std::min(lowest, limit_in(place / file));
  }
  return lowest;
}

}  // namespace

int64_t memory_limit_bytes(const fs::path& membership, const fs::path& root) {
  int64_t lowest = kNoLimit;
  std::ifstream file(membership);
  // hierarchy:controllers:group; version 2 names no controllers.
  for (std::string line; std::getline(file, line);) {
    const size_t first = line.find(':'),
                 second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    const fs::path group = line.substr(second + 1);
    if (controllers == ",,") lowest = std::min(lowest, lowest_limit(root, group, "memory.max"));
    if (controllers.find(",memory,") != std::string::npos)
      lowest = std::min(lowest, lowest_limit(root / "memory", group, "memory.limit_in_bytes"));
  }
  return lowest == kNoLimit ? 0 : lowest;
}

int64_t host_memory_bytes() {
  const long pages = sysconf(_SC_PHYS_PAGES), page_size = sysconf(_SC_PAGE_SIZE);
  const int64_t physical = pages > 0 && page_size > 0 ? static_cast<int64_t>(pages) * page_size : 0;
  const int64_t limit = memory_limit_bytes("/proc/self/cgroup", "/sys/fs/cgroup");
  if (limit == 0 || physical == 0) return std::max(limit, physical);
  return std::min(limit, physical);
}

void return_free_memory() {
  unmap_kept_tensors();
#if defined(__GLIBC__)
  malloc_trim(0);
#endif
}

}  // namespace isobath
