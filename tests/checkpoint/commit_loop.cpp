// Verifies the newest generation of a store, then commits further ones until it is killed (kill_during_commit.py).
//
// Prints "pid <rank> <pid>", "opened <step>" and "committed <step>"; a generation whose content is wrong ends it with 1.
#include <unistd.h>

#include <cstdio>
#include <isobath/checkpoint/run_directory.hpp>
#include <isobath/comm/runtime.hpp>
#include <optional>

#include "checkpoint/scratch.hpp"

namespace isobath::checkpoint::test {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kLargeElements = 1 << 16;

/// Large enough that a kill also meets the writing of a dataset.
at::Tensor large_of(int64_t step) { return at::full({kLargeElements}, static_cast<double>(step), at::kFloat); }

std::string wrong_content(const Generation& generation) {
  const int64_t step = generation.state().next_block;
  for (int index = 0; index < kTensors; ++index) {
    if (!at::equal(generation.read(tensor_name(index)), tensor_of(index, step))) return tensor_name(index);
  }
  for (int rank = 0; generation.contains("large" + std::to_string(rank)); ++rank) {
    if (!at::equal(generation.read("large" + std::to_string(rank)), large_of(step))) return "large";
  }
  return generation.contains("large0") ? "" : "no large tensor";
}

void loop(const fs::path& path, const comm::Communicator& comm) {
  const auto mode = fs::exists(path / "run.json") ? RunDirectory::Mode::resume : RunDirectory::Mode::create;
  comm.barrier();
  const RunDirectory directory(path, mode, {{"model", "tiny"}}, comm);
  GenerationStore store(path / "checkpoint", 2, {{"model", "tiny"}}, comm);
  int64_t step = 0;
  if (const auto opened = store.open_latest(path)) {
    step = opened->state().next_block;
    comm.agree(wrong_content(*opened), ExitCode::checkpoint);
  }
  if (comm.rank() == 0) std::printf("opened %lld\n", static_cast<long long>(step));
  for (;;) {
    ++step;
    const std::string output = output_name(step % 3, comm.rank()) + "." + std::to_string(step);
    write_bytes(path / output, output);
    auto tensors = share_of(comm.rank(), comm.size(), step);
    tensors.emplace_back("large" + std::to_string(comm.rank()), large_of(step));
    store.commit(state_of(step), tensors, path, {output});
    if (comm.rank() == 0) std::printf("committed %lld\n", static_cast<long long>(step));
  }
}

}  // namespace
}  // namespace isobath::checkpoint::test

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  isobath::comm::Runtime runtime(argc, argv);
  std::printf("pid %d %d\n", runtime.world().rank(), static_cast<int>(::getpid()));
  try {
    isobath::checkpoint::test::loop(argv[1], runtime.world());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "failed: %s\n", error.what());
    runtime.abort(isobath::exit_code_of(error));
  }
}
