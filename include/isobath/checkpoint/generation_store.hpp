#pragma once
#include <cstdint>
#include <filesystem>
#include <isobath/checkpoint/run_state.hpp>
#include <isobath/comm/communicator.hpp>
#include <isobath/io/hdf5_file.hpp>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace isobath::checkpoint {

/// Name-value pairs that must be equal for a resume ("quantization.bits" -> "3"); a difference is reported by
/// name with both values.
using Fingerprint = std::map<std::string, std::string>;

/// A committed generation, readable by any number of ranks: tensors are found by name in whichever rank's
/// file holds them. Files are opened at the first `read`: read what is needed before later commits remove the
/// generation.
class Generation {
 public:
  [[nodiscard]] int64_t number() const;
  [[nodiscard]] const RunState& state() const;
  [[nodiscard]] bool contains(const std::string& name) const;
  [[nodiscard]] at::Tensor read(const std::string& name) const;
  struct State;
  explicit Generation(std::shared_ptr<State> state) : state_(std::move(state)) {}

 private:
  std::shared_ptr<State> state_;
};

/// Checkpoints by the commit protocol of docs/reliability.md: `gen-000017.tmp/` with one HDF5 file a rank,
/// closed strongly, re-read, fsynced; all ranks agree; rank 0 writes manifest.json (sizes, digests,
/// fingerprint, state) and renames the directory. `keep` generations stay; an older one is deleted only after
/// the newer was verified.
class GenerationStore {
 public:
  /// Collective over `comm`, which must outlive this object.
  GenerationStore(std::filesystem::path directory, int64_t keep, Fingerprint fingerprint,
                  const comm::Communicator& comm);

  /// Collective. `tensors`: this rank's share, names unique over all ranks. `outputs`: files outside the
  /// generation that it vouches for (finished output shards), relative to `outputs_root`; given by the rank
  /// that wrote them; their size and XXH3 digest go into the manifest, carried over from generation to
  /// generation. Throws AgreedFailure (io); the previous generation stays valid.
  void commit(const RunState& state, const std::vector<std::pair<std::string, at::Tensor>>& tensors,
              const std::filesystem::path& outputs_root, const std::vector<std::string>& new_outputs);

  /// Collective: the newest generation whose manifest, files and outputs all verify; a bad one is reported
  /// (log::warning with the file) and the one before is tried. Empty when there is none. A fingerprint
  /// difference throws AgreedFailure (checkpoint) naming each differing field with both values.
  [[nodiscard]] std::optional<Generation> open_latest(const std::filesystem::path& outputs_root);

 private:
  struct State;
  std::shared_ptr<State> state_;
};

}  // namespace isobath::checkpoint
