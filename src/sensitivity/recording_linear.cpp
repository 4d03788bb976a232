#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>
#include <isobath/core/error.hpp>
#include <isobath/sensitivity/recording_linear.hpp>

namespace isobath::sensitivity {
namespace {

// The graph can outlive the caller's frame, and saved_data holds IValues only.
struct Callback : torch::CustomClassHolder {
  explicit Callback(OnBackward function) : on_backward(std::move(function)) {}
  OnBackward on_backward;
};

struct RecordingLinear : torch::autograd::Function<RecordingLinear> {
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& x,
                            const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                            const c10::intrusive_ptr<Callback>& callback) {
    context->save_for_backward({x, weight});
    context->saved_data["callback"] = c10::IValue::make_capsule(callback);
    return at::linear(x, weight, bias);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& gradients) {
    const auto saved = context->get_saved_variables();
    const at::Tensor x = saved[0].detach(), weight = saved[1].detach(), gradient = gradients[0].detach();
    const auto capsule = context->saved_data["callback"].toCapsule();
    static_cast<const Callback&>(*capsule).on_backward(x, gradient);
    return {at::matmul(gradient, weight), {}, {}, {}};
  }
};

}  // namespace

at::Tensor recording_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                            OnBackward on_backward) {
  ISOBATH_CHECK(x.dim() == 3 && weight.dim() == 2 && x.size(2) == weight.size(1),
                "recording_linear expects x [b, T, d_in] and weight [d_out, d_in]");
  ISOBATH_CHECK(static_cast<bool>(on_backward), "recording_linear needs a callback");
  // An undefined tensor is no input of an autograd function; an empty optional is.
  const std::optional<at::Tensor> optional_bias = bias.defined() ? std::optional(bias) : std::nullopt;
  return RecordingLinear::apply(x, weight, optional_bias,
                                c10::make_intrusive<Callback>(std::move(on_backward)));
}

}  // namespace isobath::sensitivity
