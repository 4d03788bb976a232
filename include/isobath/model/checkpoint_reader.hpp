#pragma once
#include <filesystem>
#include <functional>
#include <isobath/io/safetensors_reader.hpp>
#include <isobath/model/block.hpp>
#include <isobath/model/model_config.hpp>
#include <memory>
#include <string>
#include <vector>

namespace isobath::model {

struct HeadWeights {
  at::Tensor final_norm;  ///< [d_model]
  at::Tensor lm_head;     ///< [vocab, d_model]; the embedding matrix when tied
};

/// Decodes a linear's weight that is not stored as `<module>.weight` (a quantized module). Returns undefined
/// when the checkpoint holds none of its tensors for `module`.
using WeightDecoder = std::function<at::Tensor(const io::ShardedReader&, const std::string& module)>;

/// A Hugging Face checkpoint of a supported model: config.json, shards, and the promise that every tensor the
/// config calls for is there with its shape. Opening reads headers only; weights are read block by block, so
/// a rank touches only its own bytes.
class CheckpointReader {
 public:
  /// Throws DataError naming shard, tensor, expected and found shape or dtype, for the first problem of each
  /// kind. `decoder`: for quantized checkpoints (formats::compressed_tensors provides one); empty: plain
  /// weights only.
  explicit CheckpointReader(const std::filesystem::path& directory, WeightDecoder decoder = {});

  [[nodiscard]] const ModelConfig& config() const;
  [[nodiscard]] const io::ShardedReader& tensors() const;
  /// Throws NumericError naming the tensor when a weight is not finite.
  [[nodiscard]] BlockWeights read_block(int64_t block, at::ScalarType dtype, c10::Device device) const;
  [[nodiscard]] at::Tensor read_embedding(at::ScalarType dtype,
                                          c10::Device device) const;  ///< [vocab, d_model]
  /// embedding: as read_embedding gave it, which a tied head shares; undefined: read from the checkpoint.
  [[nodiscard]] HeadWeights read_head(at::ScalarType dtype, c10::Device device,
                                      const at::Tensor& embedding = {}) const;
  /// Names of all tensors outside the blocks' seven linears' weights that belong to `block` (norms, biases),
  /// and of those outside all blocks: what a quantized checkpoint copies unchanged.
  [[nodiscard]] std::vector<std::string> other_tensors_of_block(int64_t block) const;
  [[nodiscard]] std::vector<std::string> tensors_outside_blocks() const;

 private:
  ModelConfig config_;
  std::shared_ptr<const io::ShardedReader> tensors_;
  WeightDecoder decoder_;
};

}  // namespace isobath::model
