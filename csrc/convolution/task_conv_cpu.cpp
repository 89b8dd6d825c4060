// CPU implementation of convolution: a thread a task, or all threads on one where tasks are few.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
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

// Each image's matrix [rows, columns] as its transpose, in blocks that fit the registers.
void transpose_images(const at::Tensor& from, int64_t rows, int64_t columns, at::Tensor& to) {
  AT_DISPATCH_FLOATING_TYPES(from.scalar_type(), "task_conv2d", [&] {
    const auto* source = from.const_data_ptr<scalar_t>();
    auto* target = to.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, from.size(0) * from.size(1), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * rows * columns; i < end * rows * columns; i += rows * columns) {
        transpose(rows, columns, source + i, columns, target + i, rows);
      }
    });
  });
}

struct OnCpu {
  static constexpr bool kHasHalfTypes = false;
  static void check_size(const ConvShape&) {}  // it counts in 64 bits

  static at::Tensor channels_last(const at::Tensor& x) {
    if (!x.is_contiguous() || x.numel() == 0) return fastmeta::channels_last(x);
    auto turned = at::empty({x.size(0), x.size(1), x.size(3), x.size(4), x.size(2)}, x.options());
    transpose_images(x, x.size(2), x.size(3) * x.size(4), turned);
    return turned;
  }

  static at::Tensor channels_first(const at::Tensor& x) {
    auto turned = at::empty({x.size(0), x.size(1), x.size(4), x.size(2), x.size(3)}, x.options());
    if (x.numel() > 0) transpose_images(x, x.size(2) * x.size(3), x.size(4), turned);
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
