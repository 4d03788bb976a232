#pragma once
#include <cstdint>
#include <filesystem>

namespace isobath {

/// Memory that this process and its neighbours of the same job may use on this host, bytes: the machine's, or
/// less where a control group (Slurm, a container) limits it. 0 when the system does not tell.
[[nodiscard]] int64_t host_memory_bytes();

/// The lowest memory limit of the control groups named in `membership` (the text of /proc/self/cgroup) and of
/// their parents, versions 1 and 2, read below `root` (/sys/fs/cgroup), bytes. 0: no limit found.
[[nodiscard]] int64_t memory_limit_bytes(const std::filesystem::path& membership,
                                         const std::filesystem::path& root);

/// Gives freed memory, which the C library and core/tensor_memory.hpp keep for the next allocation, back to
/// the system. Costs a pass over free lists, and a page fault for each page that is used again.
void return_free_memory();

}  // namespace isobath
