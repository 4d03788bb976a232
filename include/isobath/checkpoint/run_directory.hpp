#pragma once
#include <filesystem>
#include <isobath/checkpoint/generation_store.hpp>
#include <isobath/comm/communicator.hpp>
#include <memory>
#include <string>

namespace isobath::checkpoint {

/// The directory that holds everything of a run: `run.json` (fingerprint, version), `lock` while a job works in it, `measure/`,
/// `checkpoint/`, `model.partial/` -> `model/`, evaluation.json, events.jsonl.
class RunDirectory {
 public:
  enum class Mode { create, resume };

  /// Collective. create: makes the directory, or takes an empty one or one without run.json and without our files; refuses one in use
  /// (names host and pid of the holder) or that holds a run (says: --resume, or another `output`; a finished one: says it is finished).
  /// resume: needs run.json with an equal fingerprint (each differing field with both values); takes over the lock of a dead holder on
  /// this host with a message. Refusals are AgreedFailure: config (2) for in use or existing, checkpoint (6) for a mismatch; io (4)
  /// when it cannot be written.
  RunDirectory(std::filesystem::path path, Mode mode, const Fingerprint& fingerprint, const comm::Communicator& comm);
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

}  // namespace isobath::checkpoint
