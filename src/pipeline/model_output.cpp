#include <isobath/pipeline/model_output.hpp>

#include <isobath/core/version.hpp>
#include <isobath/formats/compressed_tensors.hpp>
#include <isobath/io/files.hpp>
#include <isobath/io/safetensors_writer.hpp>
#include <nlohmann/json.hpp>
#include <set>

namespace isobath::pipeline {
namespace {

namespace fs = std::filesystem;

// Files that travel with a checkpoint: tokenizer, generation defaults, chat template, licence; never weights
// or other indices.
bool travels_along(const fs::directory_entry& entry) {
  static const std::set<std::string> kExtensions{".json", ".model", ".txt", ".jinja", ".md", ".tiktoken"};
  const std::string name = entry.path().filename().string();
  return entry.is_regular_file() && kExtensions.contains(entry.path().extension().string()) &&
         name != "config.json" && !name.ends_with(".index.json");
}

}  // namespace

ModelOutput::ModelOutput(const Session& session, const fs::path& run_directory, const std::string& name)
    : session_(session), partial_(run_directory / (name + ".partial")), final_(run_directory / name) {}

std::string ModelOutput::shard_name(int64_t index) const {
  return io::shard_file_name(index, session_.model().n_blocks + 1);
}

std::map<std::string, std::string> ModelOutput::provenance() const {
  std::string options;
  for (const auto& [key, value] : session_.config.flatten())
    if (key.starts_with("sensitivity.") || key.starts_with("quantization.") ||
        key.starts_with("calibration."))
      options += fmt::format("{}={}\n", key, value);
  return {{"format", "pt"},
          {"isobath.version", kVersion},
          {kSourceModelKey, session_.source->tensors().fingerprint()},
          {"isobath.options", options}};
}

void ModelOutput::start() const {
  fs::remove_all(partial_);
  io::make_directories(partial_);
}

std::string ModelOutput::write_outside_blocks() const {
  io::NamedTensors tensors;
  for (const std::string& name : session_.source->tensors_outside_blocks())
    tensors.emplace_back(name, session_.source->tensors().read(name));
  io::write_safetensors(partial_ / shard_name(1), tensors, provenance());
  return shard_name(1);
}

std::string ModelOutput::write_block(
    int64_t block, const std::map<model::Projection, quant::QuantizedMatrix>& matrices) const {
  io::NamedTensors tensors;
  for (const std::string& name : session_.source->other_tensors_of_block(block))
    tensors.emplace_back(name, session_.source->tensors().read(name));
  for (int p = 0; p < model::kProjections; ++p) {
    const auto projection = static_cast<model::Projection>(p);
    const std::string module = model::module_name(block, projection);
    if (const auto found = matrices.find(projection); found != matrices.end()) {
      for (auto& tensor : formats::compressed_tensors::encode(module, found->second))
        tensors.push_back(std::move(tensor));
    } else {
      tensors.emplace_back(module + ".weight", session_.source->tensors().read(module + ".weight"));
    }
  }
  const std::string name = shard_name(block + 2);
  io::write_safetensors(partial_ / name, tensors, provenance());
  return name;
}

void ModelOutput::finish(const std::map<std::string, quant::GridSpec>& modules,
                         const std::vector<std::string>& ignored) const {
  session_.world().agree_on([&] {
    if (session_.world().rank() != 0) return;
    io::remove_temporaries(partial_);  // of a run that was killed while it wrote a block
    for (const auto& entry : fs::directory_iterator(session_.config.model))
      if (travels_along(entry)) io::copy_atomically(entry.path(), partial_ / entry.path().filename());
    nlohmann::json weight_map = nlohmann::json::object();
    int64_t total_bytes = 0;
    for (int64_t index = 1; index <= session_.model().n_blocks + 1; ++index) {
      const io::SafetensorsReader shard(partial_ / shard_name(index));
      for (const auto& [name, info] : shard.tensors()) {
        weight_map[name] = shard_name(index);
        total_bytes += info.end - info.begin;
      }
    }
    const nlohmann::json index{{"metadata", {{"total_size", total_bytes}}}, {"weight_map", weight_map}};
    io::write_text_atomically(partial_ / "model.safetensors.index.json", index.dump(2) + "\n");
    // config.json last: without it no loader takes the directory for a model.
    const std::string original = io::read_text(fs::path(session_.config.model) / "config.json");
    io::write_text_atomically(partial_ / "config.json",
                              formats::compressed_tensors::config_json(original, modules, ignored,
                                                                       fmt::format("isobath {}", kVersion)));
    io::rename_durably(partial_, final_);
  });
}

}  // namespace isobath::pipeline
