// CUDA implementation of ridge regression: tensors to launchers.
#include <c10/cuda/CUDAGuard.h>

#include "common/cuda/cuda_check.h"
#include "ridge_head/ridge_head_ops.h"

namespace fastmeta {
namespace {

struct OnCuda {
  static void forward(Dtype dtype, const RidgeShape& shape, const RidgeOperands& operands,
                      const at::Tensor& like) {
    const c10::cuda::CUDAGuard guard(like.device());
    const auto workspace = scratch(ridge_head_workspace(dtype, shape), like);
    check_launch(
        launch_ridge_head(dtype, shape, operands, workspace.mutable_data_ptr(), current_stream()),
        "ridge_head");
  }

  static void backward(Dtype dtype, const RidgeShape& shape, const RidgeOperands& operands,
                       const RidgeGradients& gradients, const at::Tensor& like) {
    const c10::cuda::CUDAGuard guard(like.device());
    const auto workspace = scratch(ridge_head_backward_workspace(dtype, shape), like);
    check_launch(launch_ridge_head_backward(dtype, shape, operands, gradients,
                                            workspace.mutable_data_ptr(), current_stream()),
                 "ridge_head_backward");
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(fastmeta, CUDA, m) { register_ridge_head<OnCuda>(m); }

}  // namespace fastmeta
