// CUDA implementation of linear_head: tensors to launchers.
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <limits>
#include <optional>
#include <string_view>
#include <tuple>

#include "common/cuda/cuda_check.h"
#include "linear_head/arguments.h"

namespace fastmeta {
namespace {

struct Arguments {
  at::Tensor x, targets, weight, bias, lr;  // tasks contiguous
  LinearHeadOperands operands;              // pointers into them
};

// On the current device; raises ValueError for a label out of range.
Arguments prepared(const LinearHeadShape& shape, HeadLoss loss, const at::Tensor& x,
                   const at::Tensor& targets, const at::Tensor& weight,
                   const std::optional<at::Tensor>& bias, const at::Tensor& lr, double weight_decay,
                   bool dual) {
  const auto count_in_int = [](const char* what, int64_t size) {
    TORCH_CHECK(size <= std::numeric_limits<int>::max(), what,
                ": expected below 2^31 on CUDA, got ", size);
  };
  count_in_int("steps x ways x examples", (shape.steps + 1) * shape.ways * shape.support);
  count_in_int("examples x examples", shape.support * shape.support);
  count_in_int("tasks x examples x ways", shape.tasks * shape.support * shape.ways);
  count_in_int("tasks x steps", shape.tasks * shape.steps);
  Arguments a{x.contiguous(),
              targets.contiguous(),
              with_contiguous_tasks(weight),
              bias ? bias->contiguous() : at::Tensor(),
              lr.contiguous(),
              {}};
  const bool has_labels = loss != HeadLoss::kMse;
  if (has_labels && check_cuda_label_range(a.targets, label_classes(loss, shape), "targets")) {
    a.x = without_absent(a.x, a.targets);
  }
  a.operands = {dtype_of(x),
                shape,
                {loss, weight_decay, dual, bias.has_value()},
                a.x.const_data_ptr(),
                a.weight.const_data_ptr(),
                bias ? a.bias.const_data_ptr() : nullptr,
                a.lr.const_data_ptr(),
                a.weight.stride(0),
                has_labels ? a.targets.const_data_ptr<int64_t>() : nullptr,
                has_labels ? nullptr : a.targets.const_data_ptr(),
                nullptr,
                nullptr};
  return a;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_head_cuda(
    const at::Tensor& x, const at::Tensor& targets, const at::Tensor& weight,
    const std::optional<at::Tensor>& bias, const at::Tensor& lr, std::string_view loss,
    double weight_decay, bool dual) {
  const HeadLoss kind = checked_head_loss(loss);
  const auto s = checked_head_shape(x, targets, weight, bias, lr, kind);
  const c10::cuda::CUDAGuard guard(x.device());
  auto a = prepared(s, kind, x, targets, weight, bias, lr, weight_decay, dual);
  auto out_weight = at::empty({s.tasks, s.ways, s.features}, x.options());
  auto out_bias = at::empty({s.tasks, bias ? s.ways : 0}, x.options());
  auto predictions = at::empty(predictions_shape(s), wide_options(x));
  auto products = at::empty(products_shape(s, dual), wide_options(x));
  if (s.tasks == 0) return {out_weight, out_bias, predictions, products};
  a.operands.predictions = predictions.mutable_data_ptr();
  a.operands.products = products.mutable_data_ptr();
  const auto workspace = scratch(linear_head_workspace(a.operands), x);
  check_launch(
      launch_linear_head(a.operands, out_weight.mutable_data_ptr(), out_bias.mutable_data_ptr(),
                         workspace.mutable_data_ptr(), current_stream()),
      "linear_head");
  return {out_weight, out_bias, predictions, products};
}

HeadGradientTensors linear_head_backward_cuda(
    const at::Tensor& grad_weight, const at::Tensor& grad_bias, const at::Tensor& x,
    const at::Tensor& targets, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    const at::Tensor& lr, const at::Tensor& predictions, const at::Tensor& products,
    std::string_view loss, double weight_decay, bool dual, bool first_order, bool input_grad) {
  const HeadLoss kind = checked_head_loss(loss);
  const auto s = checked_head_shape(x, targets, weight, bias, lr, kind);
  TORCH_CHECK(s.steps > 0, "lr: expected at least one step, got 0");
  check_head_upstream(grad_weight, grad_bias, x, s, bias.has_value());
  check_head_kept(predictions, products, x, s, dual);
  const c10::cuda::CUDAGuard guard(x.device());
  auto a = prepared(s, kind, x, targets, weight, bias, lr, weight_decay, dual);
  const auto upstream_weight = grad_weight.contiguous(), upstream_bias = grad_bias.contiguous();
  const auto kept_predictions = predictions.contiguous(), kept_products = products.contiguous();
  const bool has_x = input_grad && !first_order;
  auto out = empty_head_gradients(x, s, a.operands.options, has_x);
  if (s.tasks == 0) return out;
  auto& [grad_x, grad_targets, grad_w, grad_b, grad_lr] = out;
  a.operands.predictions = const_cast<void*>(kept_predictions.const_data_ptr());
  a.operands.products = const_cast<void*>(kept_products.const_data_ptr());
  const LinearHeadUpstream upstream{upstream_weight.const_data_ptr(),
                                    upstream_bias.const_data_ptr(), first_order};
  const LinearHeadGradients gradients{
      has_x ? grad_x.mutable_data_ptr() : nullptr, grad_w.mutable_data_ptr(),
      grad_b.mutable_data_ptr(), grad_lr.mutable_data_ptr(),
      kind == HeadLoss::kMse ? grad_targets.mutable_data_ptr() : nullptr};
  const auto workspace = scratch(linear_head_backward_workspace(a.operands), x);
  check_launch(launch_linear_head_backward(a.operands, upstream, gradients,
                                           workspace.mutable_data_ptr(), current_stream()),
               "linear_head_backward");
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastmeta, CUDA, m) {
  m.impl("linear_head", &linear_head_cuda);
  m.impl("linear_head_backward", &linear_head_backward_cuda);
}

}  // namespace fastmeta
