// CUDA implementation of convolution: calls to the launcher. float32 becomes TF32 if PyTorch's
// setting for convolutions, torch.backends.cudnn.allow_tf32, allows it.
#include <ATen/Context.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "common/cuda/cuda_check.h"
#include "convolution/cuda/int_sizes.h"
#include "task_conv2d/task_conv2d.h"
#include "task_conv2d/task_conv2d_ops.h"

namespace fastmeta {
namespace {

Array<void> array(const TaskArray& a) { return {a.data, a.stride}; }

Convolution<void> convolution(const TaskConvCall& call) {
  const auto z = array(call.outputs), x = array(call.inputs), w = array(call.weights);
  const bool to_output = call.to == MapTo::kOutput, to_weight = call.to == MapTo::kWeight;
  Convolution<void> c{call.shape, call.to, call.examples, to_output ? z : to_weight ? w : x};
  c.bias = array(call.bias);
  c.add(to_output ? x : z, to_weight ? x : w);
  return c;
}

struct OnCuda {
  static void check_size(const ConvShape& shape) { check_counts_in_int(shape, "task_conv2d"); }

  static at::Tensor channels_last(const at::Tensor& x) { return fastmeta::channels_last(x); }
  static at::Tensor channels_first(const at::Tensor& x) {
    return x.permute({0, 1, 4, 2, 3}).contiguous();
  }
  static void run(const TaskConvCall& call, const at::Tensor& like) {
    const c10::cuda::CUDAGuard guard(like.device());
    const auto workspace = scratch(task_conv_workspace(call.dtype), like);
    const bool tf32 = at::globalContext().allowTF32CuDNN(at::Float32Op::CONV);
    check_launch(launch_task_conv(call.dtype, convolution(call), call.tasks, tf32,
                                  workspace.mutable_data_ptr(), current_stream()),
                 "task_conv2d");
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(fastmeta, CUDA, m) { register_task_conv<OnCuda>(m); }

}  // namespace fastmeta
