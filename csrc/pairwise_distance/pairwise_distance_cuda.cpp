// CUDA implementation of pairwise_distance: tensors to launchers.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <string_view>
#include <tuple>

#include "common/cuda/cuda_check.h"
#include "pairwise_distance/arguments.h"

namespace fastmeta {
namespace {

at::Tensor pairwise_distance_cuda(const at::Tensor& x, const at::Tensor& y,
                                  std::string_view metric_name) {
  const Metric metric = checked_metric(metric_name);
  const PairwiseShape shape = checked_pairwise_shape(x, y);
  const c10::cuda::CUDAGuard guard(x.device());
  const auto rows = x.contiguous(), columns = y.contiguous();
  auto out = at::empty({shape.tasks, shape.queries, shape.classes}, x.options());
  if (out.numel() == 0) return out;
  const PairwiseOperands operands{dtype_of(x), metric, shape, rows.const_data_ptr(),
                                  columns.const_data_ptr()};
  const auto workspace = scratch(pairwise_distance_workspace(operands), x);
  check_launch(launch_pairwise_distance(operands, out.mutable_data_ptr(),
                                        workspace.mutable_data_ptr(), current_stream()),
               "pairwise_distance");
  return out;
}

std::tuple<at::Tensor, at::Tensor> pairwise_distance_backward_cuda(const at::Tensor& grad_distance,
                                                                   const at::Tensor& x,
                                                                   const at::Tensor& y,
                                                                   std::string_view metric_name) {
  const Metric metric = checked_metric(metric_name);
  const PairwiseShape shape = checked_pairwise_shape(x, y);
  check_shape(grad_distance, {shape.tasks, shape.queries, shape.classes}, "grad_distance");
  check_same(grad_distance, x, "grad_distance and x");
  const c10::cuda::CUDAGuard guard(x.device());
  const auto rows = x.contiguous(), columns = y.contiguous(), grad = grad_distance.contiguous();
  if (grad.numel() == 0 || shape.features == 0) {
    return {at::zeros(x.sizes(), x.options()), at::zeros(y.sizes(), y.options())};
  }
  auto grad_x = at::empty(x.sizes(), x.options()), grad_y = at::empty(y.sizes(), y.options());
  const PairwiseOperands operands{dtype_of(x), metric, shape, rows.const_data_ptr(),
                                  columns.const_data_ptr()};
  const auto workspace = scratch(pairwise_distance_backward_workspace(operands), x);
  check_launch(launch_pairwise_distance_backward(
                   operands, grad.const_data_ptr(), grad_x.mutable_data_ptr(),
                   grad_y.mutable_data_ptr(), workspace.mutable_data_ptr(), current_stream()),
               "pairwise_distance_backward");
  return {grad_x, grad_y};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastmeta, CUDA, m) {
  m.impl("pairwise_distance", &pairwise_distance_cuda);
  m.impl("pairwise_distance_backward", &pairwise_distance_backward_cuda);
}

}  // namespace fastmeta
