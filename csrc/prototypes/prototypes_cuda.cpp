// CUDA implementation of prototypes: tensors to launchers.
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "common/cuda/cuda_check.h"
#include "prototypes/arguments.h"

namespace fastmeta {
namespace {

at::Tensor prototypes_cuda(const at::Tensor& x, const at::Tensor& labels, int64_t num_classes) {
  const auto shape = checked_prototypes_shape(x, labels, num_classes);
  const c10::cuda::CUDAGuard guard(x.device());
  const auto embeddings = x.contiguous(), classes = labels.contiguous();
  check_cuda_label_range(classes, num_classes, "labels");
  auto out = at::empty({shape.tasks, shape.classes, shape.features}, x.options());
  if (out.numel() == 0) return out;
  check_launch(launch_prototypes(dtype_of(x), shape, embeddings.const_data_ptr(),
                                 classes.const_data_ptr<int64_t>(), out.mutable_data_ptr(),
                                 current_stream()),
               "prototypes");
  return out;
}

at::Tensor prototypes_backward_cuda(const at::Tensor& grad_prototypes, const at::Tensor& labels) {
  const auto shape = checked_prototypes_backward_shape(grad_prototypes, labels);
  const c10::cuda::CUDAGuard guard(grad_prototypes.device());
  const auto grad = grad_prototypes.contiguous(), classes = labels.contiguous();
  check_cuda_label_range(classes, shape.classes, "labels");
  auto grad_x = at::empty({shape.tasks, shape.support, shape.features}, grad.options());
  if (grad_x.numel() == 0) return grad_x;
  check_launch(launch_prototypes_backward(dtype_of(grad), shape, grad.const_data_ptr(),
                                          classes.const_data_ptr<int64_t>(),
                                          grad_x.mutable_data_ptr(), current_stream()),
               "prototypes_backward");
  return grad_x;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastmeta, CUDA, m) {
  m.impl("prototypes", &prototypes_cuda);
  m.impl("prototypes_backward", &prototypes_backward_cuda);
}

}  // namespace fastmeta
