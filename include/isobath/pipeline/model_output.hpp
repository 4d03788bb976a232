#pragma once
#include <filesystem>
#include <isobath/pipeline/session.hpp>
#include <isobath/quant/grid.hpp>
#include <map>
#include <string>
#include <vector>

namespace isobath::pipeline {

/// In `__metadata__` of every shard: the fingerprint of the model that the checkpoint was made from.
inline constexpr const char* kSourceModelKey = "isobath.source_model";

/// The quantized checkpoint under construction: `NAME.partial/`, renamed to `NAME/` when everything is in it.
///
/// Shards   model-00001-of-N: what stands outside the blocks; model-(b+2)-of-N: block b. So every block is
/// written once, by the rank
///          that owns it, as soon as it is solved; index and config.json come last.
class ModelOutput {
 public:
  /// name: of the directory in that of the run.
  ModelOutput(const Session& session, const std::filesystem::path& run_directory, const std::string& name);

  [[nodiscard]] const std::filesystem::path& partial_directory() const { return partial_; }

  /// Local, on the first rank: an empty directory.
  void start() const;
  /// Local, on one rank: copies the tensors outside the blocks. Returns the file's name.
  [[nodiscard]] std::string write_outside_blocks() const;
  /// Local, on the rank that owns the block: packs the quantized linears and copies the rest. Returns the
  /// file's name. Linears without a matrix are copied as they are.
  [[nodiscard]] std::string write_block(
      int64_t block, const std::map<model::Projection, quant::QuantizedMatrix>& matrices) const;
  /// Collective: copies tokenizer and generation files, writes index and config.json, renames to `NAME/`.
  void finish(const std::map<std::string, quant::GridSpec>& modules,
              const std::vector<std::string>& ignored) const;

 private:
  [[nodiscard]] std::string shard_name(int64_t index) const;
  [[nodiscard]] std::map<std::string, std::string> provenance() const;

  const Session& session_;
  std::filesystem::path partial_, final_;
};

}  // namespace isobath::pipeline
