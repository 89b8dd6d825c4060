// CUDA implementation of batch norm: passes to the launcher.
#include <c10/cuda/CUDAGuard.h>

#include "batch_norm/batch_norm_ops.h"
#include "common/cuda/cuda_check.h"

namespace fastmeta {
namespace {

struct OnCuda {
  template <typename Pass>
  static void run(Dtype dtype, const BatchNormShape& shape, double eps, const Pass& pass,
                  const at::Tensor& like) {
    const c10::cuda::CUDAGuard guard(like.device());
    check_launch(launch_batch_norm(dtype, shape, eps, pass, current_stream()), "task_batch_norm");
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(fastmeta, CUDA, m) { register_batch_norm<OnCuda>(m); }

}  // namespace fastmeta
