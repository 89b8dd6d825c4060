// CUDA implementation of pair_scores: tensors to launchers.
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>

#include "common/cuda/cuda_check.h"
#include "pair_scores/pair_scores_ops.h"

namespace fastmeta {
namespace {

struct OnCuda {
  static at::Tensor sums(const PairScoresArrays& arrays, const at::Tensor& bias) {
    const auto& shape = arrays.shape;
    const c10::cuda::CUDAGuard guard(arrays.x.device());
    auto out = at::empty({shape.tasks, shape.queries, shape.classes}, arrays.x.options());
    if (out.numel() == 0) return out;
    check_launch(launch_pair_sums(arrays.operands(), bias.const_data_ptr(), out.mutable_data_ptr(),
                                  current_stream()),
                 "pair_scores");
    return out;
  }

  static PairScoresGradients gradients(const PairScoresArrays& arrays, const at::Tensor& upstream) {
    const c10::cuda::CUDAGuard guard(arrays.x.device());
    auto grads = PairScoresGradients::zeros(arrays);
    if (upstream.numel() == 0) return grads;
    const auto operands = arrays.operands();
    const auto workspace = scratch(pair_gradient_workspace(operands), arrays.x);
    check_launch(launch_pair_gradient(
                     operands, upstream.const_data_ptr(), grads.x.mutable_data_ptr(),
                     grads.y.mutable_data_ptr(), grads.weight.mutable_data_ptr(),
                     grads.bias.mutable_data_ptr(), workspace.mutable_data_ptr(), current_stream()),
                 "pair_scores_backward");
    return grads;
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(fastmeta, CUDA, m) { register_pair_scores<OnCuda>(m); }

}  // namespace fastmeta
