// CPU implementation of convolution: a thread a task, or all threads on one where tasks are few.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>

#include "common/kept_memory.h"
#include "common/parallel.h"
#include "convolution/cpu_convolution.h"
#include "convolution/task_conv_ops.h"

namespace fastmeta {
namespace {

template <typename value_t>
value_t* at_task(const TaskArray& array, int64_t task) {
  return static_cast<value_t*>(array.data) + task * array.stride;
}

template <typename value_t>
void run_task(const TaskConvCall& call, const CpuConvolution<value_t>& convolution, int64_t task,
              value_t* scratch) {
  auto* z = at_task<value_t>(call.outputs, task);
  auto* x = at_task<value_t>(call.inputs, task);
  auto* w = at_task<value_t>(call.weights, task);
  const ConvPair<value_t> to_output{x, w}, to_input{z, w}, to_weight{z, x};
  switch (call.to) {
    case MapTo::kOutput:
      return convolution.output({&to_output, 1}, z, at_task<value_t>(call.bias, task), false,
                                scratch);
    case MapTo::kInput:
      return convolution.input({&to_input, 1}, x, false, scratch);
    case MapTo::kWeight:
      return convolution.weight({&to_weight, 1}, w, false, 1, scratch);
  }
}

template <typename value_t>
void run_as(const TaskConvCall& call) {
  const int64_t threads = at::get_num_threads();
  const bool shares_threads = call.tasks < threads;
  for_each_task_range(call.tasks, [&](int64_t begin, int64_t end) {
    const CpuConvolution<value_t> convolution(call.shape, call.examples, shares_threads);
    const int64_t elements = convolution.scratch(call.shape) * (shares_threads ? threads : 1);
    const auto memory = kept_memory(elements * static_cast<int64_t>(sizeof(value_t)));
    auto* scratch = static_cast<value_t*>(memory.mutable_data_ptr());
    for (int64_t t = begin; t < end; ++t) run_task(call, convolution, t, scratch);
  });
}

struct OnCpu {
  static constexpr bool kHasHalfTypes = false;
  static void check_size(const ConvShape&) {}  // it counts in 64 bits

  // Contiguous images in blocks that fit the registers; other views by a copy.
  static at::Tensor channels_last(const at::Tensor& x) {
    if (!x.is_contiguous() || x.numel() == 0) return fastmeta::channels_last(x);
    auto turned = at::empty({x.size(0), x.size(1), x.size(3), x.size(4), x.size(2)}, x.options());
    const int64_t channels = x.size(2), pixels = x.size(3) * x.size(4);
    AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "channels_last", [&] {
      const auto* source = x.const_data_ptr<scalar_t>();
      auto* target = turned.mutable_data_ptr<scalar_t>();
      for_each_task_range(x.size(0) * x.size(1), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin * channels * pixels; i < end * channels * pixels;
             i += channels * pixels) {
          transpose(channels, pixels, source + i, pixels, target + i, channels);
        }
      });
    });
    return turned;
  }

  static void run(const TaskConvCall& call, const at::Tensor&) {
    if (call.dtype == Dtype::kFloat) {
      run_as<float>(call);
    } else {
      run_as<double>(call);
    }
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(fastmeta, CPU, m) { register_task_conv<OnCpu>(m); }

}  // namespace fastmeta
