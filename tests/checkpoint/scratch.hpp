#pragma once
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <stdlib.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <isobath/checkpoint/generation_store.hpp>
#include <isobath/comm/communicator.hpp>
#include <isobath/core/error.hpp>
#include <iterator>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace isobath::checkpoint::test {

/// A directory that all ranks share for one test; removed at its end.
class Scratch {
 public:
  explicit Scratch(const comm::Communicator& comm) : comm_(comm) {
    std::string path = (std::filesystem::temp_directory_path() / "isobath-test-XXXXXX").string();
    if (comm.rank() == 0 && ::mkdtemp(path.data()) == nullptr) path.clear();
    comm.broadcast(path, 0);
    path_ = path;
  }
  ~Scratch() {
    comm_.barrier();
    std::error_code ignored;
    if (comm_.rank() == 0) std::filesystem::remove_all(path_, ignored);
  }
  [[nodiscard]] const std::filesystem::path& path() const { return path_; }

 private:
  const comm::Communicator& comm_;
  std::filesystem::path path_;
};

inline std::string read_bytes(const std::filesystem::path& path) {
  std::ifstream stream(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>()};
}

inline void write_bytes(const std::filesystem::path& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary) << bytes;
}

/// What rank 0 changes on disk, seen by all ranks afterwards.
template <class Change>
void on_root(const comm::Communicator& comm, Change&& change) {
  comm.barrier();
  if (comm.rank() == 0) change();
  comm.barrier();
}

constexpr int kTensors = 7;

inline std::string tensor_name(int index) {
  return "block/" + std::to_string(index) + "/value";
}

/// Content that depends on the step, so that a tensor of another generation is noticed.
inline at::Tensor tensor_of(int index, int64_t step) {
  return at::arange(12 + index, at::kFloat)
      .mul(0.5)
      .add(static_cast<double>(1000 * step + index))
      .reshape({-1, 1});
}

inline std::vector<std::pair<std::string, at::Tensor>> share_of(int rank, int n_ranks, int64_t step) {
  std::vector<std::pair<std::string, at::Tensor>> share;
  for (int index = rank; index < kTensors; index += n_ranks)
    share.emplace_back(tensor_name(index), tensor_of(index, step));
  return share;
}

inline RunState state_of(int64_t step) {
  RunState state;
  state.stage = "quantize";
  state.next_block = step;
  state.seed = 0xfedcba9876543210u;
  state.bits = {{"model.layers.0.mlp.down_proj", 4}, {"model.layers.0.mlp.up_proj", 3}};
  state.module_records = {R"({"module": "a", "bits": 3})", std::string("with \0 inside", 13)};
  state.reestimations = {R"({"block": 2, "cosine": 0.5})"};
  state.next_step = 3 * step;
  state.epoch_kl = {0.1, 1.0 / 3};
  state.epoch_tokens = {4096, 512};
  return state;
}

inline std::string output_name(int64_t step, int rank) {
  return "block-" + std::to_string(step) + "-" + std::to_string(rank) + ".bin";
}

/// One commit by the ranks of `comm`: their tensors and one output file each.
inline void commit_step(GenerationStore& store, const comm::Communicator& comm,
                        const std::filesystem::path& outputs, int64_t step) {
  const std::string name = output_name(step, comm.rank());
  write_bytes(outputs / name, "output " + name);
  store.commit(state_of(step), share_of(comm.rank(), comm.size(), step), outputs, {name});
}

inline void expect_step(const Generation& generation, int64_t step) {
  const RunState expected = state_of(step), &found = generation.state();
  EXPECT_EQ(found.stage, expected.stage);
  EXPECT_EQ(found.next_block, expected.next_block);
  EXPECT_EQ(found.seed, expected.seed);
  EXPECT_EQ(found.sensitivity_from_block, -1);
  EXPECT_EQ(found.bits, expected.bits);
  EXPECT_EQ(found.module_records, expected.module_records);
  EXPECT_EQ(found.reestimations, expected.reestimations);
  EXPECT_EQ(found.next_step, expected.next_step);
  EXPECT_EQ(found.epoch_kl, expected.epoch_kl);
  EXPECT_EQ(found.epoch_tokens, expected.epoch_tokens);
  for (int index = 0; index < kTensors; ++index) {
    EXPECT_TRUE(generation.contains(tensor_name(index))) << index;
    EXPECT_TRUE(at::equal(generation.read(tensor_name(index)), tensor_of(index, step))) << index;
  }
}

/// Runs a collective `action` that must fail on every rank with one and the same message; returns it.
template <class Action>
std::string expect_agreed_failure(const comm::Communicator& comm, ExitCode code, Action&& action) {
  std::string message = "nothing was thrown";
  ExitCode found = ExitCode::ok;
  try {
    action();
  } catch (const AgreedFailure& failure) {
    message = failure.what();
    found = failure.code();
  }
  EXPECT_EQ(static_cast<int>(found), static_cast<int>(code)) << message;
  const std::vector<std::string> all = comm.all_gather(message);
  EXPECT_EQ(std::count(all.begin(), all.end(), message), comm.size()) << message;
  return message;
}

}  // namespace isobath::checkpoint::test
