// Verifies the newest generation of a store, then commits further ones until it is killed
// (kill_during_commit.py).
//
// Prints "pid <rank> <pid>" and "opened <step>", and adds each committed step to a file; what mpirun was
// still to forward is lost when it is killed, a file's content is not. A generation whose content is wrong
// ends the program with its exit code.
#include <fcntl.h>
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
at::Tensor large_of(int64_t step) {
  return at::full({kLargeElements}, static_cast<double>(step), at::kFloat);
}

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

void acknowledge(int file, int64_t step) {
  const std::string line = std::to_string(step) + "\n";
  if (::write(file, line.data(), line.size()) != static_cast<ssize_t>(line.size())) {
    fail<IoError>("cannot acknowledge step {}", step);
  }
}

void loop(const fs::path& path, const fs::path& acknowledgements, const comm::Communicator& comm) {
  const int file = ::open(acknowledgements.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
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
    if (comm.rank() == 0) acknowledge(file, step);
  }
}

}  // namespace
}  // namespace isobath::checkpoint::test

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  isobath::comm::Runtime runtime(argc, argv);
  std::printf("pid %d %d\n", runtime.world().rank(), static_cast<int>(::getpid()));
  try {
    isobath::checkpoint::test::loop(argv[1], argv[2], runtime.world());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "failed: %s\n", error.what());
    runtime.abort(isobath::exit_code_of(error));
  }
}
