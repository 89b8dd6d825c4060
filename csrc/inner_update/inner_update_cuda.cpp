// CUDA implementation of inner_update: tensors to launchers.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <tuple>

#include "common/cuda/cuda_check.h"
#include "inner_update/arguments.h"

namespace fastmeta {
namespace {

at::Tensor inner_update_cuda(const at::Tensor& params, const at::Tensor& grads,
                             const at::Tensor& lr) {
  const auto p = with_contiguous_rows(params), g = with_contiguous_rows(grads);
  const auto step = lr.contiguous();
  const auto shape = checked_inner_update_shape(p, g, step);
  const c10::cuda::CUDAGuard guard(params.device());
  auto out = at::empty(params.sizes(), params.options());
  if (out.numel() == 0) return out;
  check_launch(launch_inner_update(dtype_of(p), shape, p.const_data_ptr(), g.const_data_ptr(),
                                   step.const_data_ptr(), out.mutable_data_ptr(), current_stream()),
               "inner_update");
  return out;
}

std::tuple<at::Tensor, at::Tensor> inner_update_backward_cuda(const at::Tensor& grad_out,
                                                              const at::Tensor& grads,
                                                              const at::Tensor& lr) {
  const auto v = with_contiguous_rows(grad_out), g = with_contiguous_rows(grads);
  const auto step = lr.contiguous();
  const auto shape = checked_inner_update_shape(v, g, step);
  const c10::cuda::CUDAGuard guard(grads.device());
  auto grad_grads = at::empty(grads.sizes(), grads.options());
  if (grad_grads.numel() == 0) return {grad_grads, at::zeros(lr.sizes(), lr.options())};
  auto grad_lr = at::empty(lr.sizes(), lr.options());
  const auto dtype = dtype_of(g);
  const auto workspace = scratch(inner_update_backward_workspace(dtype, shape), g);
  check_launch(launch_inner_update_backward(dtype, shape, v.const_data_ptr(), g.const_data_ptr(),
                                            step.const_data_ptr(), grad_grads.mutable_data_ptr(),
                                            grad_lr.mutable_data_ptr(),
                                            workspace.mutable_data_ptr(), current_stream()),
               "inner_update_backward");
  return {grad_grads, grad_lr};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastmeta, CUDA, m) {
  m.impl("inner_update", &inner_update_cuda);
  m.impl("inner_update_backward", &inner_update_backward_cuda);
}

}  // namespace fastmeta
