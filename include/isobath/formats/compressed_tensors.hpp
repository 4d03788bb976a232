#pragma once
#include <filesystem>
#include <isobath/io/safetensors_reader.hpp>
#include <isobath/io/safetensors_writer.hpp>
#include <isobath/quant/grid.hpp>
#include <map>
#include <optional>
#include <string>
#include <vector>

/// compressed-tensors `pack-quantized` (FORMATS §2): what transformers loads; of engines see README, Limits.
namespace isobath::formats::compressed_tensors {

/// `<module>.weight_packed|weight_scale|weight_shape[|weight_zero_point]` of one linear.
[[nodiscard]] io::NamedTensors encode(const std::string& module, const quant::QuantizedMatrix& matrix);

/// Weight of `module` as a loader sees it: [R, C] storage dtype; undefined when the checkpoint holds no
/// packed tensors for it. Needs the checkpoint's quantization_config (`schemes`). Throws DataError for
/// inconsistent shapes.
struct Scheme {
  int bits;
  int64_t group;  ///< 0: channel
  bool symmetric;
};
/// Module -> scheme, from config.json of `directory`; empty map when it is not a compressed-tensors
/// checkpoint. Throws DataError for another quant_method or format (names what is supported).
class SchemeTable {
 public:
  explicit SchemeTable(const std::filesystem::path& directory);
  [[nodiscard]] bool empty() const;
  /// Scheme of a module by compressed-tensors' rules (exact name, pattern, class "Linear"); null when none or
  /// ignored.
  [[nodiscard]] const Scheme* find(const std::string& module) const;
  /// Codes, scales and zeros of a module; empty when the checkpoint holds no packed tensors for it.
  [[nodiscard]] std::optional<quant::QuantizedMatrix> read(const io::ShardedReader& tensors,
                                                           const std::string& module) const;
  [[nodiscard]] at::Tensor decode(const io::ShardedReader& tensors, const std::string& module) const;

 private:
  struct Group {
    std::vector<std::string> targets;
    Scheme scheme;
  };
  std::vector<Group> groups_;
  std::vector<std::string> ignored_;
};

/// The text of the quantized checkpoint's config.json: the original's with `quantization_config` added.
/// Modules of equal scheme form one config group; with one scheme its target is "Linear" and `ignore` lists
/// the rest; otherwise targets are exact module names.
[[nodiscard]] std::string config_json(const std::string& original_config_json,
                                      const std::map<std::string, quant::GridSpec>& modules,
                                      const std::vector<std::string>& ignore, const std::string& provenance);

}  // namespace isobath::formats::compressed_tensors
