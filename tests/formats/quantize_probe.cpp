#include <ATen/ATen.h>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <isobath/formats/compressed_tensors.hpp>
#include <isobath/quant/solver.hpp>
#include <sstream>

/// Rounds every linear of a checkpoint's blocks to nearest and writes the compressed-tensors checkpoint, for
/// check_transformers_load.py. `dequantized.safetensors` beside it holds the weights a loader must see.
/// Usage: quantize_probe IN OUT BITS GROUP sym|asym [BITS_OF_DOWN_PROJ]
int main(int argc, char** argv) {
  using namespace isobath;
  if (argc < 6) {
    std::fputs("usage: quantize_probe IN OUT BITS GROUP sym|asym [BITS_OF_DOWN_PROJ]\n", stderr);
    return 2;
  }
  const std::filesystem::path in = argv[1], out = argv[2];
  const quant::GridSpec spec{
      .bits = std::stoi(argv[3]), .group = std::stoll(argv[4]), .symmetric = std::string(argv[5]) == "sym"};
  quant::GridSpec down = spec;
  if (argc > 6) down.bits = std::stoi(argv[6]);

  const io::ShardedReader reader(in);
  io::NamedTensors tensors, dequantized;
  std::map<std::string, quant::GridSpec> modules;
  for (const std::string& name : reader.names()) {
    const at::Tensor tensor = reader.read(name);
    const std::string suffix = ".weight";
    if (!name.ends_with("_proj" + suffix)) {
      tensors.emplace_back(name, tensor);
      continue;
    }
    const std::string module = name.substr(0, name.size() - suffix.size());
    modules[module] = module.ends_with("down_proj") ? down : spec;
    const auto matrix = quant::round_to_nearest(tensor.to(at::kFloat), {}, modules[module]);
    for (auto& part : formats::compressed_tensors::encode(module, matrix)) tensors.push_back(std::move(part));
    dequantized.emplace_back(name, quant::dequantize(matrix));
  }
  std::filesystem::create_directories(out);
  io::write_safetensors(out / "model.safetensors", tensors, {{"format", "pt"}});
  io::write_safetensors(out / "dequantized.safetensors", dequantized, {});
  std::ostringstream config;
  config << std::ifstream(in / "config.json").rdbuf();
  std::ofstream(out / "config.json") << formats::compressed_tensors::config_json(
      config.str(), modules, {"lm_head"}, "quantize_probe");
  return 0;
}
