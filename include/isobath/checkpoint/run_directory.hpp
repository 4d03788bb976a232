#pragma once
#include <filesystem>
#include <isobath/checkpoint/generation_store.hpp>
#include <isobath/comm/communicator.hpp>
#include <memory>
#include <string>

namespace isobath::checkpoint {

/// The directory that holds everything of a run: `run.json` (fingerprint, version), `lock` while a job works
/// in it, `measure/`, `checkpoint/`, `model.partial/` -> `model/`, evaluation.json, events.jsonl.
class RunDirectory {
 public:
  enum class Mode { create, resume };

  /// Collective over `comm`, which must outlive this object. create: makes the directory, or takes an empty
  /// one; refuses one in use (names host and pid of the holder), one that holds a run (says: --resume, or
  /// another `output`; finished when "evaluate" is complete) and one with other files. resume: needs run.json
  /// of this version with an equal fingerprint (each differing field with both values). Both take over the
  /// lock of a dead holder with a warning (docs/reliability.md). Refusals are AgreedFailure: config (2) for
  /// in use, existing, or nothing to resume; checkpoint (6) for a mismatch or a damaged run.json; io (4) when
  /// it cannot be written.
  RunDirectory(std::filesystem::path path, Mode mode, const Fingerprint& fingerprint,
               const comm::Communicator& comm);
  ~RunDirectory();  // removes the lock (rank 0)
  RunDirectory(RunDirectory&&) noexcept;

  [[nodiscard]] const std::filesystem::path& path() const;
  /// Stages that are complete ("measure", "quantize", "evaluate"), as marked in run.json.
  [[nodiscard]] bool is_complete(const std::string& stage) const;
  /// Collective: durably marks a stage complete.
  void mark_complete(const std::string& stage);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// The fingerprint of the run in a directory; empty when there is none, or none that can be read. Local.
[[nodiscard]] Fingerprint recorded_fingerprint(const std::filesystem::path& run);

}  // namespace isobath::checkpoint
