#include <isobath/checkpoint/generation_store.hpp>
#include <isobath/core/digest.hpp>
#include <isobath/core/error.hpp>
#include <isobath/core/log.hpp>
#include <isobath/io/files.hpp>

#include <algorithm>
#include <set>

#include "generation_files.hpp"
#include "record.hpp"

namespace isobath::checkpoint {
namespace fs = std::filesystem;
namespace {

FileRecord write_rank_file(const fs::path& directory, int rank,
                           const std::vector<std::pair<std::string, at::Tensor>>& tensors) {
  const std::string name = rank_file_name(rank);
  io::Hdf5Writer writer(directory / name);
  for (const auto& [dataset, tensor] : tensors) writer.write(dataset, tensor);
  writer.commit();
  FileRecord record = FileRecord::of(directory, name);
  for (const auto& [dataset, tensor] : tensors) record.datasets.push_back(dataset);
  return record;
}

/// Durable before the generation vouches for it, whoever wrote it.
FileRecord record_output(const fs::path& root, const std::string& name) {
  FileRecord record = FileRecord::of(root, name);
  io::sync_file(root / name);
  io::sync_directory((root / name).parent_path());
  return record;
}

void check_unique(const Manifest& manifest) {
  std::set<std::string> seen;
  for (const FileRecord& file : manifest.rank_files) {
    for (const std::string& name : file.datasets) {
      ISOBATH_CHECK(seen.insert(name).second, "two ranks hand the tensor {} to a checkpoint", name);
    }
  }
}

/// Rank 0 must see what the others wrote; a node-local output directory shows here.
void check_visible(const fs::path& directory, const Manifest& manifest) {
  for (const FileRecord& file : manifest.rank_files) {
    std::error_code status;
    const auto size = fs::file_size(directory / file.name, status);
    if (status || static_cast<int64_t>(size) != file.bytes) {
      fail<IoError>(
          "{} was written with {} bytes but rank 0 finds {}; the output directory must be on a file system "
          "that all ranks share",
          (directory / file.name).string(), file.bytes,
          status ? status.message() : fmt::format("{} bytes", size));
    }
  }
}

}  // namespace

struct Generation::State {
  fs::path directory;
  int64_t number = 0;
  RunState run_state;
  std::map<std::string, std::string> file_of;
  std::map<std::string, io::Hdf5Reader> readers;
};

int64_t Generation::number() const {
  return state_->number;
}
const RunState& Generation::state() const {
  return state_->run_state;
}
bool Generation::contains(const std::string& name) const {
  return state_->file_of.contains(name);
}

at::Tensor Generation::read(const std::string& name) const {
  const auto found = state_->file_of.find(name);
  if (found == state_->file_of.end()) {
    fail<CheckpointError>("{} holds no tensor {}", state_->directory.string(), name);
  }
  auto reader = state_->readers.find(found->second);
  if (reader == state_->readers.end()) {
    reader = state_->readers.emplace(found->second, io::Hdf5Reader(state_->directory / found->second)).first;
  }
  return reader->second.read(name);
}

struct GenerationStore::State {
  fs::path directory;
  int64_t keep;
  Fingerprint fingerprint;
  const comm::Communicator* comm;
  int64_t next_number = 1;
  // Of rank 0 only.
  std::map<std::string, FileRecord> outputs;
  std::set<int64_t> bad;

  [[nodiscard]] bool is_root() const { return comm->rank() == 0; }
  [[nodiscard]] fs::path path_of(int64_t number) const { return directory / generation_name(number); }
  [[nodiscard]] fs::path temporary_of(int64_t number) const {
    return path_of(number).string() + kTemporarySuffix;
  }

  void write_manifest(const Manifest& manifest, const RunState& run_state) const;
  void undo(int64_t number) const;
  void prune(int64_t newest);
  [[nodiscard]] std::string next_manifest(std::vector<int64_t>& candidates);
  [[nodiscard]] std::string problems_of(const Manifest& manifest, const fs::path& outputs_root) const;
  [[nodiscard]] std::optional<RunState> read_state(const Manifest& manifest);
};

GenerationStore::GenerationStore(fs::path directory, int64_t keep, Fingerprint fingerprint,
                                 const comm::Communicator& comm)
    : state_(std::make_shared<State>()) {
  ISOBATH_CHECK(keep >= 1, "a store must keep at least one generation, not {}", keep);
  state_->directory = std::move(directory);
  state_->keep = keep;
  state_->fingerprint = std::move(fingerprint);
  state_->comm = &comm;
  comm.agree_on([&] {
    if (!state_->is_root()) return;
    io::make_directories(state_->directory);
    const Listing listing = list_generations(state_->directory);
    if (!listing.generations.empty()) state_->next_number = *listing.generations.rbegin() + 1;
  });
  comm.broadcast(std::span<int64_t>(&state_->next_number, 1), 0);
}

void GenerationStore::commit(const RunState& run_state,
                             const std::vector<std::pair<std::string, at::Tensor>>& tensors,
                             const fs::path& outputs_root, const std::vector<std::string>& new_outputs) {
  State& store = *state_;
  const comm::Communicator& comm = *store.comm;
  const int64_t number = store.next_number++;
  const fs::path temporary = store.temporary_of(number);
  Manifest manifest{number, store.fingerprint, {}, {}, store.outputs};
  try {
    comm.agree_on([&] {
      if (!store.is_root()) return;
      remove_or_warn(temporary);
      io::make_directories(temporary);
    });
    std::string share_text;
    comm.agree_on([&] {
      Json written;
      written["file"] = write_rank_file(temporary, comm.rank(), tensors).to_json();
      written["outputs"] = Json::array();
      for (const std::string& name : new_outputs) {
        written["outputs"].push_back(record_output(outputs_root, name).to_json());
      }
      share_text = written.dump();
    });
    for (const std::string& text : comm.all_gather(share_text)) {
      const Json share = Json::parse(text);
      manifest.rank_files.push_back(FileRecord::from_json(share.at("file")));
      for (const Json& output : share.at("outputs")) {
        FileRecord record = FileRecord::from_json(output);
        manifest.outputs[record.name] = std::move(record);
      }
    }
    comm.agree_on([&] {
      if (store.is_root()) store.write_manifest(manifest, run_state);
    });
    comm.agree_on([&] {
      if (store.is_root()) io::rename_durably(temporary, store.path_of(number));
    });
  } catch (const AgreedFailure&) {
    if (store.is_root()) store.undo(number);
    throw;
  }
  if (store.is_root()) {
    store.outputs = std::move(manifest.outputs);
    store.prune(number);
  }
}

void GenerationStore::State::write_manifest(const Manifest& draft, const RunState& run_state) const {
  check_unique(draft);
  const fs::path temporary = temporary_of(draft.number);
  check_visible(temporary, draft);
  io::write_text_atomically(temporary / kStateName, archive(run_state));
  Manifest manifest = draft;
  manifest.state = FileRecord::of(temporary, kStateName);
  const std::string text = manifest.to_text();
  io::write_text_atomically(temporary / kManifestName, text);
  if (io::read_text(temporary / kManifestName) != text) {
    fail<IoError>("{} reads back other bytes than were written", (temporary / kManifestName).string());
  }
  io::sync_directory(temporary);
}

void GenerationStore::State::undo(int64_t number) const {
  std::error_code status;
  if (fs::exists(temporary_of(number), status)) {
    remove_or_warn(temporary_of(number));
  } else if (fs::exists(path_of(number), status)) {
    // The rename succeeded but could not be made durable.
    retire(path_of(number));
  }
}

void GenerationStore::State::prune(int64_t newest) {
  std::set<int64_t> generations;
  try {
    generations = list_generations(directory).generations;
  } catch (const IoError& error) {
    log::warning("old checkpoints stay: {}", error.what());
    return;
  }
  int64_t kept = 1;
  for (auto number = generations.rbegin(); number != generations.rend(); ++number) {
    if (*number == newest || (!bad.contains(*number) && ++kept <= keep)) continue;
    retire(path_of(*number));
  }
  bad.clear();
}

/// Rank 0: the text of the newest candidate's manifest that is whole; bad ones on the way are reported.
std::string GenerationStore::State::next_manifest(std::vector<int64_t>& candidates) {
  while (!candidates.empty()) {
    const int64_t number = candidates.back();
    candidates.pop_back();
    const fs::path path = path_of(number) / kManifestName;
    try {
      std::string text = io::read_text(path);
      const Manifest manifest = Manifest::from_text(text, path.string());
      if (manifest.number == number) return text;
      log::warning("checkpoint {} is not used: its manifest is that of generation {}",
                   path_of(number).string(), manifest.number);
    } catch (const Error& error) {
      log::warning("checkpoint {} is not used: {}", path_of(number).string(), error.what());
    }
    bad.insert(number);
  }
  return {};
}

/// Collective: every file of the generation is digested by one rank; the same list of problems on all ranks.
std::string GenerationStore::State::problems_of(const Manifest& manifest,
                                                const fs::path& outputs_root) const {
  std::string problems;
  auto verify = [&, index = 0](const fs::path& root, const FileRecord& file) mutable {
    if (index++ % comm->size() != comm->rank()) return;
    if (const std::string problem = file.problem_in(root); !problem.empty()) problems += problem + "; ";
  };
  for (const FileRecord& file : manifest.rank_files) verify(path_of(manifest.number), file);
  for (const auto& [name, file] : manifest.outputs) verify(outputs_root, file);
  std::string all;
  for (const std::string& share : comm->all_gather(problems)) all += share;
  return all.substr(0, all.size() - std::min<size_t>(all.size(), 2));
}

/// Collective: rank 0 reads the archive once and digests the very bytes that are then opened.
std::optional<RunState> GenerationStore::State::read_state(const Manifest& manifest) {
  std::string bytes, problem;
  if (is_root()) {
    const fs::path path = path_of(manifest.number) / kStateName;
    try {
      bytes = io::read_text(path);
      if (const std::string found = Digest().update(bytes).hex(); found != manifest.state.digest) {
        problem = fmt::format("{} is damaged: its digest is {}, the manifest records {}", path.string(),
                              found, manifest.state.digest);
      }
    } catch (const Error& error) {
      problem = error.what();
    }
  }
  comm->broadcast(problem, 0);
  std::optional<RunState> run_state;
  if (problem.empty()) {
    comm->broadcast(bytes, 0);
    try {
      run_state = unarchive(bytes);
    } catch (const std::exception& error) {
      problem = fmt::format("its state cannot be read: {}", error.what());
    }
  }
  if (is_root() && !problem.empty()) {
    log::warning("checkpoint {} is not used: {}", path_of(manifest.number).string(), problem);
  }
  if (comm->any(!problem.empty())) return std::nullopt;
  return run_state;
}

std::optional<Generation> GenerationStore::open_latest(const fs::path& outputs_root) {
  State& store = *state_;
  const comm::Communicator& comm = *store.comm;
  std::vector<int64_t> candidates;
  comm.agree_on([&] {
    if (!store.is_root()) return;
    const Listing listing = list_generations(store.directory);
    for (const fs::path& unfinished : listing.unfinished) {
      log::info("removing {}, which an interrupted run left unfinished", unfinished.string());
      remove_or_warn(unfinished);
    }
    candidates.assign(listing.generations.begin(), listing.generations.end());
  });
  for (;;) {
    std::string text;
    if (store.is_root()) text = store.next_manifest(candidates);
    comm.broadcast(text, 0);
    if (text.empty()) return std::nullopt;
    Manifest manifest = Manifest::from_text(text, "the manifest of rank 0");
    const fs::path path = store.path_of(manifest.number);

    std::string difference;
    if (store.is_root()) difference = differences(manifest.fingerprint, store.fingerprint);
    if (!difference.empty()) {
      difference = fmt::format(
          "checkpoint {} was made by a different run:\n  {}\nrestore these values, or choose "
          "another `output`",
          path.string(), difference);
    }
    comm.agree(difference, ExitCode::checkpoint);

    const std::string problems = store.problems_of(manifest, outputs_root);
    std::optional<RunState> run_state;
    if (problems.empty()) {
      run_state = store.read_state(manifest);
    } else if (store.is_root()) {
      log::warning("checkpoint {} is not used: {}", path.string(), problems);
    }
    if (!run_state) {
      store.bad.insert(manifest.number);
      continue;
    }

    auto opened = std::make_shared<Generation::State>();
    opened->directory = path;
    opened->number = manifest.number;
    opened->run_state = std::move(*run_state);
    for (const FileRecord& file : manifest.rank_files) {
      for (const std::string& name : file.datasets) opened->file_of.emplace(name, file.name);
    }
    store.outputs = std::move(manifest.outputs);
    return Generation(std::move(opened));
  }
}

}  // namespace isobath::checkpoint
