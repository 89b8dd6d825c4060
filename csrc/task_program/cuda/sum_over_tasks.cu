#include "common/ceil_div.h"
#include "common/cuda/launch.cuh"
#include "common/cuda/reduce.cuh"
#include "task_program/cuda/sum_over_tasks.h"

namespace fastmeta {
namespace {

constexpr int kRows = 8;

// target[i] += sum over tasks of source[t, i]. A block owns 32 columns: a warp adds up every
// kRows-th task, the first warp their sums. T n reads; for the 1761 numbers and 25 tasks of a small
// MLP the launch dominates.
template <typename value_t>
__global__ void __launch_bounds__(kRows* kWarp)
    sum_over_tasks_kernel(int64_t tasks, int64_t n, const value_t* source, int64_t task_stride,
                          value_t* target) {
  __shared__ value_t sums[kRows][kWarp];
  const int lane = threadIdx.x % kWarp, row = threadIdx.x / kWarp;
  const int64_t i = int64_t(blockIdx.x) * kWarp + lane;
  value_t sum = 0;
  if (i < n) {
    for (int64_t t = row; t < tasks; t += kRows) sum += source[t * task_stride + i];
  }
  sums[row][lane] = sum;
  __syncthreads();
  if (row > 0 || i >= n) return;
  for (int r = 1; r < kRows; ++r) sum += sums[r][lane];
  target[i] += sum;
}

}  // namespace

template <typename value_t>
int launch_sum_over_tasks(int64_t tasks, int64_t n, const value_t* source, int64_t task_stride,
                          value_t* target, void* stream) {
  return launch(sum_over_tasks_kernel<value_t>, ceil_div(n, kWarp), kRows * kWarp, 0,
                static_cast<cudaStream_t>(stream), tasks, n, source, task_stride, target);
}

template int launch_sum_over_tasks(int64_t, int64_t, const float*, int64_t, float*, void*);
template int launch_sum_over_tasks(int64_t, int64_t, const double*, int64_t, double*, void*);

}  // namespace fastmeta
