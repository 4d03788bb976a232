#include <isobath/pipeline/versions.hpp>

#include <ATen/core/Tensor.h>

#include <isobath/formats/compressed_tensors.hpp>
#include <isobath/pipeline/model_output.hpp>

namespace isobath::pipeline {
namespace {

using formats::compressed_tensors::Scheme;
using formats::compressed_tensors::SchemeTable;

std::shared_ptr<model::CheckpointReader> open_reader(const Session& session,
                                                     const std::filesystem::path& checkpoint,
                                                     std::shared_ptr<const SchemeTable> schemes) {
  auto reader = std::make_shared<model::CheckpointReader>(
      checkpoint, [schemes = std::move(schemes)](const io::ShardedReader& shards, const std::string& module) {
        return schemes->decode(shards, module);
      });
  const model::ModelConfig &a = session.model(), &b = reader->config();
  if (a.vocab_size != b.vocab_size || a.n_blocks != b.n_blocks || a.d_model != b.d_model)
    fail<DataError>("{} is not a version of {}: blocks {} and {}, d_model {} and {}, vocabulary {} and {}",
                    checkpoint.string(), session.config.model, b.n_blocks, a.n_blocks, b.d_model, a.d_model,
                    b.vocab_size, a.vocab_size);
  return reader;
}

std::string text_of(int bits, int64_t group, bool is_symmetric) {
  return fmt::format("{} bits, group {}, {}", bits, group == 0 ? "channel" : std::to_string(group),
                     is_symmetric ? "symmetric" : "asymmetric");
}

/// Every linear that the configuration quantizes must stand on its grid, with this width.
void require_grid(const Session& session, const std::filesystem::path& checkpoint, const SchemeTable& schemes,
                  int bits) {
  const config::Quantization& quantization = session.config.quantization;
  for (int64_t block = 0; block < session.model().n_blocks; ++block)
    for (int p = 0; p < model::kProjections; ++p) {
      const std::string module = model::module_name(block, static_cast<model::Projection>(p));
      const config::ModuleChoice choice = config::choice_for(quantization, module);
      if (!choice.quantized) continue;
      const Scheme* scheme = schemes.find(module);
      const std::string found =
          scheme == nullptr ? "no quantized weight" : text_of(scheme->bits, scheme->group, scheme->symmetric);
      const std::string expected = text_of(bits, choice.group, quantization.symmetric);
      if (found != expected)
        fail<DataError>(
            "sensitivity.gram.checkpoints: {}: {}: expected {} as in the configuration, found {}; quantize "
            "with "
            "--set quantization.bits={} and the same grid",
            checkpoint.string(), module, expected, found, bits);
    }
}

/// Checkpoints of isobath say what they were made from.
void require_source(const Session& session, const model::CheckpointReader& version) {
  const io::ShardedReader& tensors = version.tensors();
  const auto& metadata = tensors.metadata_beside(tensors.names().front());
  const auto source = metadata.find(kSourceModelKey);
  const std::string expected = session.source->tensors().fingerprint();
  if (source != metadata.end() && source->second != expected)
    fail<DataError>(
        "sensitivity.gram.checkpoints: {} was made from another model than {}: expected digest {}, found {}; "
        "`isobath quantize` makes one from this",
        tensors.directory().string(), session.config.model, expected, source->second);
}

}  // namespace

model::WeightStore open_version(const Session& session, const std::filesystem::path& checkpoint) {
  std::shared_ptr<model::CheckpointReader> reader;
  session.world().agree_on(
      [&] { reader = open_reader(session, checkpoint, std::make_shared<const SchemeTable>(checkpoint)); });
  return open_weights(session, std::move(reader));
}

std::vector<std::shared_ptr<const model::CheckpointReader>> open_perturbed_versions(const Session& session) {
  const config::Sensitivity& sensitivity = session.config.sensitivity;
  std::vector<std::shared_ptr<const model::CheckpointReader>> versions;
  session.world().agree_on([&] {
    for (size_t k = 0; k < sensitivity.gram_checkpoints.size(); ++k) {
      const std::filesystem::path checkpoint = sensitivity.gram_checkpoints[k];
      const auto schemes = std::make_shared<const SchemeTable>(checkpoint);
      versions.push_back(open_reader(session, checkpoint, schemes));
      require_source(session, *versions.back());
      require_grid(session, checkpoint, *schemes, sensitivity.gram_bits[k]);
    }
  });
  return versions;
}

}  // namespace isobath::pipeline
