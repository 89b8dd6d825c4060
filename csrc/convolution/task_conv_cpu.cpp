// CPU implementation of convolution: a thread a task, or all threads on one where tasks are few.
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
void run_as(const TaskConvCall& call, const at::Tensor& like) {
  const int64_t threads = at::get_num_threads();
  const bool shares_threads = call.tasks < threads;
  for_each_task_range(call.tasks, [&](int64_t begin, int64_t end) {
    const CpuConvolution<value_t> convolution(call.shape, call.examples, shares_threads);
    const int64_t elements = convolution.scratch(call.shape) * (shares_threads ? threads : 1);
    const auto scratch = at::empty({elements}, like.options());
    for (int64_t t = begin; t < end; ++t) {
      run_task(call, convolution, t, scratch.mutable_data_ptr<value_t>());
    }
  });
}

struct OnCpu {
  static constexpr bool kHasHalfTypes = false;
  static void check_size(const ConvShape&) {}  // it counts in 64 bits

  static void run(const TaskConvCall& call, const at::Tensor& like) {
    if (call.dtype == Dtype::kFloat) {
      run_as<float>(call, like);
    } else {
      run_as<double>(call, like);
    }
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(fastmeta, CPU, m) { register_task_conv<OnCpu>(m); }

}  // namespace fastmeta
