#pragma once
#include <ATen/core/Tensor.h>

#include <isobath/model/checkpoint_reader.hpp>
#include <map>
#include <string>

namespace isobath::model {

/// What the model computes for some tokens, with the gradient of the summed loss everywhere it matters.
struct Probe {
  at::Tensor logits;  ///< [b, T, vocab] f32
  double nll_sum = 0;
  std::map<std::string, at::Tensor>
      gradients;  ///< by module, at its output; "hidden": at the last block's output
};

/// One forward and backward of the whole model in `dtype`. tokens [b, T] i32, all of full length.
[[nodiscard]] Probe probe_gradients(const CheckpointReader& checkpoint, const at::Tensor& tokens,
                                    at::ScalarType dtype);

}  // namespace isobath::model
