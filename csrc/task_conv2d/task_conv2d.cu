#include "task_conv2d/task_conv2d.h"
#include "task_program/cuda/grid_executor.cuh"

namespace fastmeta {
namespace {

template <typename value_t>
Array<value_t> numbers(const Array<void>& a) {
  return {static_cast<value_t*>(a.data), a.task_stride};
}

template <typename value_t>
int launch_as(const Convolution<void>& c, int64_t tasks, bool tf32, void* workspace,
              cudaStream_t stream) {
  Convolution<value_t> typed{c.shape, c.to, c.examples, numbers<value_t>(c.c)};
  typed.bias = numbers<value_t>(c.bias);
  typed.add(numbers<value_t>(c.a[0]), numbers<value_t>(c.b[0]));
  GridExecutor<value_t> executor(tasks, static_cast<acc_t<value_t>*>(workspace), stream,
                                 {.convolutions = tf32});
  executor.convolution(typed, NoFinish{});
  return executor.error();
}

}  // namespace

int64_t task_conv_workspace(Dtype dtype) {
  const auto number =
      static_cast<int64_t>(dtype == Dtype::kDouble ? sizeof(double) : sizeof(float));
  return number * GridExecutor<float>::part_numbers();
}

int launch_task_conv(Dtype dtype, const Convolution<void>& c, int64_t tasks, bool tf32,
                     void* workspace, void* stream) {
  return with_dtype(dtype, [&]<typename value_t>(ScalarType<value_t>) {
    return launch_as<value_t>(c, tasks, tf32, workspace, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace fastmeta
