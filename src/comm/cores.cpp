#include <isobath/comm/cores.hpp>

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace isobath::comm {
namespace {

cpu_set_t mask_of(pid_t process) {
  cpu_set_t mask;
  CPU_ZERO(&mask);
  if (sched_getaffinity(process, sizeof mask, &mask) != 0) CPU_ZERO(&mask);
  return mask;
}

int overlap(const cpu_set_t& a, const cpu_set_t& b) {
  cpu_set_t both;
  CPU_AND(&both, &a, &b);
  return CPU_COUNT(&both);
}

/// Of the daemon of Open MPI's mpirun that started this rank, which binds ranks but not itself; 0: another
/// launcher.
int cores_of_launcher() {
  if (std::getenv("OMPI_COMM_WORLD_SIZE") == nullptr) return 0;
  const cpu_set_t mask = mask_of(getppid());
  return CPU_COUNT(&mask);
}

}  // namespace

NodeCores cores_of(const Communicator& node) {
  const cpu_set_t mine = mask_of(0);
  std::vector<cpu_set_t> masks;
  for (const std::string& bytes : node.all_gather({reinterpret_cast<const char*>(&mine), sizeof mine})) {
    masks.emplace_back();
    std::memcpy(&masks.back(), bytes.data(), sizeof mine);
  }
  cpu_set_t all;
  CPU_ZERO(&all);
  for (const cpu_set_t& mask : masks) CPU_OR(&all, &all, &mask);
  NodeCores cores{.usable = CPU_COUNT(&all), .per_rank = CPU_COUNT(&all)};
  for (const cpu_set_t& mask : masks) {
    const auto sharers =
        std::ranges::count_if(masks, [&](const cpu_set_t& other) { return overlap(mask, other) > 0; });
    const int share = sharers == 0 ? 0 : CPU_COUNT(&mask) / static_cast<int>(sharers);
    cores.per_rank = std::min(cores.per_rank, share);
  }
  cores.available = node.all_reduce(std::max(cores.usable, cores_of_launcher()), Reduce::min);
  return cores;
}

}  // namespace isobath::comm
