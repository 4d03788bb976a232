// model_probe MODEL_DIR TOKENS.safetensors OUT.safetensors: the C++ side of
// tools/python/compare_with_transformers.py.
#include <ATen/ATen.h>
#include <fmt/format.h>

#include <cstdio>
#include <isobath/core/error.hpp>
#include <isobath/io/safetensors_reader.hpp>
#include <isobath/io/safetensors_writer.hpp>

#include "model/gradient_probe.hpp"

int main(int argc, char** argv) {
  if (argc != 4) {
    fmt::print(stderr, "usage: model_probe MODEL_DIR TOKENS.safetensors OUT.safetensors\n");
    return static_cast<int>(isobath::ExitCode::config);
  }
  try {
    const isobath::model::CheckpointReader checkpoint(argv[1]);
    const at::Tensor tokens = isobath::io::SafetensorsReader(argv[2]).read("tokens");
    const auto probe = isobath::model::probe_gradients(checkpoint, tokens, at::kFloat);
    isobath::io::NamedTensors tensors = {{"logits", probe.logits},
                                         {"nll_sum", at::full({1}, probe.nll_sum, at::kDouble)}};
    for (const auto& [name, gradient] : probe.gradients) {
      tensors.emplace_back("gradient." + name, gradient.contiguous());
    }
    isobath::io::write_safetensors(argv[3], tensors, {});
    return 0;
  } catch (const std::exception& error) {
    fmt::print(stderr, "error: {}\n", isobath::describe(error));
    return static_cast<int>(isobath::exit_code_of(error));
  }
}
