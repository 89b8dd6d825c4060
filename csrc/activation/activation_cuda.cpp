// CUDA implementation of activations: passes to the launcher.
#include <c10/cuda/CUDAGuard.h>

#include "activation/activation_ops.h"
#include "common/cuda/cuda_check.h"

namespace fastmeta {
namespace {

struct OnCuda {
  template <typename Pass>
  static void run(const Activation& f, int64_t count, const Pass& pass, const at::Tensor& like) {
    const c10::cuda::CUDAGuard guard(like.device());
    check_launch(launch_activation(f, count, pass, current_stream()), "activation");
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(fastmeta, CUDA, m) { register_activation<OnCuda>(m); }

}  // namespace fastmeta
