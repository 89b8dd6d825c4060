#include <algorithm>

#include "common/ceil_div.h"
#include "common/cuda/copy.cuh"
#include "common/cuda/launch.cuh"
#include "common/cuda/reduce.cuh"
#include "common/cuda/workspace.h"
#include "inner_update/inner_update.h"

namespace fastmeta {
namespace {

constexpr int kThreads = 256;
constexpr int kSumThreads = 1024;
constexpr int64_t kWantedThreads = 1 << 18;  // enough to fill a large GPU

// Views rows as packs of n values: the shape's lengths and strides count packs.
template <typename scalar_t, int n>
InnerUpdateShape in_packs(const InnerUpdateShape& s) {
  return {s.tasks, s.parameters / n, s.params_stride / n, s.grads_stride / n,
          // One step size a task is not packed: its stride stays in numbers.
          s.lr_parameter_stride == 0 ? s.lr_task_stride : s.lr_task_stride / n,
          s.lr_parameter_stride};
}

template <int n, typename value_t>
__device__ Pack<value_t, n> filled(value_t value) {
  Pack<value_t, n> pack;
#pragma unroll
  for (int i = 0; i < n; ++i) pack[i] = value;
  return pack;
}

// Step sizes of pack p of task t.
template <int n, typename value_t>
__device__ Pack<value_t, n> step_sizes(const value_t* lr, const InnerUpdateShape& s, int64_t t,
                                       int64_t p) {
  return s.lr_parameter_stride == 0 ? filled<n>(lr[t * s.lr_task_stride])
                                    : as_packs<n>(lr)[t * s.lr_task_stride + p];
}

// A block's stretch of one row: kPacks packs a thread, neighbours in neighbouring threads.
template <int n>
struct Stretch {
  // Narrow packs need more loads under way to hide the memory's latency.
  static constexpr int kPacks = n == 1 ? 8 : 4;
  static constexpr int64_t kSize = int64_t(kThreads) * kPacks;

  static int64_t blocks(const InnerUpdateShape& s) {
    return s.tasks * ceil_div(s.parameters, kSize);
  }

  int64_t task, first;

  __device__ explicit Stretch(const InnerUpdateShape& s) {
    const int64_t stretches = ceil_div(s.parameters, kSize);
    task = blockIdx.x / stretches;
    first = blockIdx.x % stretches * kSize + threadIdx.x;
  }
  __device__ int64_t pack(int i) const { return first + int64_t(i) * kThreads; }
};

// out[t, p] = params[t, p] - lr[t, p] grads[t, p]; [T, P], lr by its strides.
// A block owns a stretch of a row, a thread kPacks packs of n values of it. acc_t arithmetic.
// Bound by memory: n fills 16 bytes where rows are aligned, and a thread's loads are all under way
// before its first store.
template <typename scalar_t, int n>
__global__ void __launch_bounds__(kThreads)
    update_kernel(InnerUpdateShape s, const Pack<scalar_t, n>* __restrict__ params,
                  const Pack<scalar_t, n>* __restrict__ grads,
                  const acc_t<scalar_t>* __restrict__ lr, Pack<scalar_t, n>* __restrict__ out) {
  constexpr int kPacks = Stretch<n>::kPacks;
  const Stretch<n> stretch(s);
  const int64_t t = stretch.task;
  Pack<scalar_t, n> param[kPacks], grad[kPacks];
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int64_t p = stretch.pack(i);
    if (p >= s.parameters) continue;
    param[i] = params[t * s.params_stride + p];
    grad[i] = grads[t * s.grads_stride + p];
  }
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int64_t p = stretch.pack(i);
    if (p >= s.parameters) continue;
    const auto step = step_sizes<n>(lr, s, t, p);
    auto moved = widen(param[i]);
    const auto direction = widen(grad[i]);
#pragma unroll
    for (int j = 0; j < n; ++j) moved[j] = descend(moved[j], direction[j], step[j]);
    out[t * s.parameters + p] = narrow<scalar_t>(moved);
  }
}

// Replaces grad_out by -lr grad_out and does sum -= grads grad_out, for one pack.
template <typename value_t, int n>
__device__ void backward_pack(Pack<value_t, n>& upstream, const Pack<value_t, n>& grad,
                              const Pack<value_t, n>& step, Pack<value_t, n>& sum) {
#pragma unroll
  for (int j = 0; j < n; ++j) {
    sum[j] -= grad[j] * upstream[j];
    upstream[j] *= -step[j];
  }
}

// grad_grads = -lr grad_out, and partial[block] = the sum of -grads grad_out over the block's
// stretch of a row, for parameters that share a step size. A thread sums, then a warp, then the
// block, in acc_t.
template <typename scalar_t, int n>
__global__ void __launch_bounds__(kThreads)
    backward_rows_kernel(InnerUpdateShape s, const Pack<scalar_t, n>* __restrict__ grad_out,
                         const Pack<scalar_t, n>* __restrict__ grads,
                         const acc_t<scalar_t>* __restrict__ lr,
                         Pack<scalar_t, n>* __restrict__ grad_grads,
                         acc_t<scalar_t>* __restrict__ partial) {
  constexpr int kPacks = Stretch<n>::kPacks;
  const Stretch<n> stretch(s);
  const int64_t t = stretch.task;
  const auto step = filled<n>(lr[t * s.lr_task_stride]);
  Pack<acc_t<scalar_t>, n> sum{};
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int64_t p = stretch.pack(i);
    if (p >= s.parameters) continue;
    auto upstream = widen(grad_out[t * s.params_stride + p]);
    const auto grad = widen(grads[t * s.grads_stride + p]);
    backward_pack(upstream, grad, step, sum);
    grad_grads[t * s.parameters + p] = narrow<scalar_t>(upstream);
  }
  acc_t<scalar_t> total = 0;
#pragma unroll
  for (int j = 0; j < n; ++j) total += sum[j];
  // One partial sum a block: a second launch adds them up, in order and without atomics.
  total = block_sum<kThreads>(total);
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

// grad_grads = -lr grad_out, and sums[slice, p] = the sum of -grads grad_out over a slice of tasks,
// for step sizes per parameter. A thread owns a pack of columns of one slice and walks its tasks in
// order: no sum crosses threads. With one task a slice, sums is grad_lr [T, P] itself.
template <typename scalar_t, int n>
__global__ void __launch_bounds__(kThreads)
    backward_columns_kernel(InnerUpdateShape s, int64_t tasks_per_slice,
                            const Pack<scalar_t, n>* __restrict__ grad_out,
                            const Pack<scalar_t, n>* __restrict__ grads,
                            const acc_t<scalar_t>* __restrict__ lr,
                            Pack<scalar_t, n>* __restrict__ grad_grads,
                            Pack<acc_t<scalar_t>, n>* __restrict__ sums) {
  const int64_t columns = ceil_div(s.parameters, kThreads);
  const int64_t slice = blockIdx.x / columns;
  const int64_t p = blockIdx.x % columns * kThreads + threadIdx.x;
  if (p >= s.parameters) return;
  const int64_t first = slice * tasks_per_slice;
  // The last slice may have fewer tasks.
  const int64_t end = first + tasks_per_slice < s.tasks ? first + tasks_per_slice : s.tasks;
  Pack<acc_t<scalar_t>, n> sum{};
#pragma unroll 4
  for (int64_t t = first; t < end; ++t) {
    auto upstream = widen(grad_out[t * s.params_stride + p]);
    const auto grad = widen(grads[t * s.grads_stride + p]);
    backward_pack(upstream, grad, step_sizes<n>(lr, s, t, p), sum);
    grad_grads[t * s.parameters + p] = narrow<scalar_t>(upstream);
  }
  sums[slice * s.parameters + p] = sum;
}

// sums[r] = sum of row r of partial [R, C]. A block owns a row; sums in double, like the CPU.
template <typename value_t>
__global__ void __launch_bounds__(kSumThreads)
    sum_rows_kernel(const value_t* partial, int64_t columns, value_t* sums) {
  partial += blockIdx.x * columns;
  double sum = 0;
  for (int64_t c = threadIdx.x; c < columns; c += kSumThreads) sum += partial[c];
  sum = block_sum<kSumThreads>(sum);
  if (threadIdx.x == 0) sums[blockIdx.x] = static_cast<value_t>(sum);
}

// sums[c] = sum of column c of partial [R, C]. A thread owns a column and walks the rows in order.
template <typename value_t>
__global__ void __launch_bounds__(kThreads)
    sum_columns_kernel(const value_t* partial, int64_t rows, int64_t columns, value_t* sums) {
  const int64_t c = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (c >= columns) return;
  value_t sum = 0;
#pragma unroll 4
  for (int64_t r = 0; r < rows; ++r) sum += partial[r * columns + c];
  sums[c] = sum;
}

// Joins rows into one long row if they, and their step sizes, are contiguous.
InnerUpdateShape joined(const InnerUpdateShape& s) {
  const bool rows = s.params_stride == s.parameters && s.grads_stride == s.parameters;
  const bool lr = s.lr_task_stride == (s.lr_parameter_stride == 0 ? 0 : s.parameters);
  // A single row needs no stride.
  if (s.tasks != 1 && !(rows && lr)) return s;
  const int64_t all = s.tasks * s.parameters;
  return {1, all, all, all, 0, s.lr_parameter_stride};
}

// Tasks that one thread of backward_columns_kernel walks.
int64_t tasks_per_slice(const InnerUpdateShape& s) {
  // Each task has step sizes of its own: nothing is summed over tasks.
  if (s.lr_task_stride != 0) return 1;
  // Few parameters: splits the tasks, so that threads fill the device.
  const int64_t slices = std::clamp<int64_t>(kWantedThreads / s.parameters, 1, s.tasks);
  return ceil_div(s.tasks, slices);
}

bool needs_column_sums(const InnerUpdateShape& s) {
  return s.lr_parameter_stride != 0 && s.lr_task_stride == 0 && tasks_per_slice(s) < s.tasks;
}

template <typename scalar_t>
bool has_wide_arrays(const InnerUpdateShape& s, const scalar_t* params, const scalar_t* grads,
                     const acc_t<scalar_t>* lr, const scalar_t* out) {
  // A shared step size is read as a number, so it needs no alignment.
  const int64_t lr_row = s.lr_parameter_stride == 0 ? 0 : s.parameters;
  return has_wide_rows(params, s.parameters, s.params_stride) &&
         has_wide_rows(grads, s.parameters, s.grads_stride) &&
         (lr_row == 0 || has_wide_rows(lr, lr_row, s.lr_task_stride)) &&
         has_wide_rows(out, s.parameters, s.parameters);
}

template <typename scalar_t, int n>
cudaError_t update(const InnerUpdateShape& shape, const scalar_t* params, const scalar_t* grads,
                   const acc_t<scalar_t>* lr, scalar_t* out, cudaStream_t stream) {
  const auto s = in_packs<scalar_t, n>(shape);
  return launch(update_kernel<scalar_t, n>, Stretch<n>::blocks(s), kThreads, 0, stream, s,
                as_packs<n>(params), as_packs<n>(grads), lr, as_packs<n>(out));
}

template <typename scalar_t, int n>
cudaError_t backward_rows(const InnerUpdateShape& shape, const scalar_t* grad_out,
                          const scalar_t* grads, const acc_t<scalar_t>* lr, scalar_t* grad_grads,
                          acc_t<scalar_t>* grad_lr, acc_t<scalar_t>* partial, cudaStream_t stream) {
  const auto s = in_packs<scalar_t, n>(shape);
  const int64_t blocks = Stretch<n>::blocks(s), rows = s.lr_task_stride == 0 ? 1 : s.tasks;
  const cudaError_t error =
      launch(backward_rows_kernel<scalar_t, n>, blocks, kThreads, 0, stream, s,
             as_packs<n>(grad_out), as_packs<n>(grads), lr, as_packs<n>(grad_grads), partial);
  if (error != cudaSuccess) return error;
  return launch(sum_rows_kernel<acc_t<scalar_t>>, rows, kSumThreads, 0, stream, partial,
                blocks / rows, grad_lr);
}

template <typename scalar_t, int n>
cudaError_t backward_columns(const InnerUpdateShape& shape, const scalar_t* grad_out,
                             const scalar_t* grads, const acc_t<scalar_t>* lr, scalar_t* grad_grads,
                             acc_t<scalar_t>* grad_lr, acc_t<scalar_t>* partial,
                             cudaStream_t stream) {
  const auto s = in_packs<scalar_t, n>(shape);
  const int64_t slice = tasks_per_slice(shape), slices = ceil_div(s.tasks, slice);
  const bool unfinished = needs_column_sums(shape);
  const cudaError_t error =
      launch(backward_columns_kernel<scalar_t, n>, slices * ceil_div(s.parameters, kThreads),
             kThreads, 0, stream, s, slice, as_packs<n>(grad_out), as_packs<n>(grads), lr,
             as_packs<n>(grad_grads), as_packs<n>(unfinished ? partial : grad_lr));
  if (error != cudaSuccess || !unfinished) return error;
  return launch(sum_columns_kernel<acc_t<scalar_t>>, ceil_div(shape.parameters, kThreads), kThreads,
                0, stream, partial, slices, shape.parameters, grad_lr);
}

template <typename scalar_t, int n>
cudaError_t backward(const InnerUpdateShape& s, const scalar_t* grad_out, const scalar_t* grads,
                     const acc_t<scalar_t>* lr, scalar_t* grad_grads, acc_t<scalar_t>* grad_lr,
                     acc_t<scalar_t>* partial, cudaStream_t stream) {
  const auto run =
      s.lr_parameter_stride == 0 ? backward_rows<scalar_t, n> : backward_columns<scalar_t, n>;
  return run(s, grad_out, grads, lr, grad_grads, grad_lr, partial, stream);
}

}  // namespace

int launch_inner_update(Dtype dtype, const InnerUpdateShape& shape, const void* params,
                        const void* grads, const void* lr, void* out, void* stream) {
  const InnerUpdateShape s = joined(shape);
  return with_dtype(dtype, [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    const auto* p = static_cast<const scalar_t*>(params);
    const auto* g = static_cast<const scalar_t*>(grads);
    const auto* step = static_cast<const acc_t<scalar_t>*>(lr);
    auto* o = static_cast<scalar_t*>(out);
    const auto run = has_wide_arrays(s, p, g, step, o) ? update<scalar_t, kAccess<scalar_t>>
                                                       : update<scalar_t, 1>;
    return run(s, p, g, step, o, static_cast<cudaStream_t>(stream));
  });
}

int64_t inner_update_backward_workspace(Dtype dtype, const InnerUpdateShape& shape) {
  const InnerUpdateShape s = joined(shape);
  return with_dtype(dtype, [&](auto type) {
    using value_t = acc_t<typename decltype(type)::type>;
    Workspace space(nullptr);
    if (s.lr_parameter_stride == 0) {
      // For the narrowest packs, which need the most blocks: alignment is known only at the launch.
      space.take<value_t>(Stretch<1>::blocks(s));
    } else if (needs_column_sums(s)) {
      space.take<value_t>(ceil_div(s.tasks, tasks_per_slice(s)) * s.parameters);
    }
    return space.bytes();
  });
}

int launch_inner_update_backward(Dtype dtype, const InnerUpdateShape& shape, const void* grad_out,
                                 const void* grads, const void* lr, void* grad_grads, void* grad_lr,
                                 void* workspace, void* stream) {
  const InnerUpdateShape s = joined(shape);
  return with_dtype(dtype, [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    using value_t = acc_t<scalar_t>;
    const auto* v = static_cast<const scalar_t*>(grad_out);
    const auto* g = static_cast<const scalar_t*>(grads);
    const auto* step = static_cast<const value_t*>(lr);
    auto* target = static_cast<scalar_t*>(grad_grads);
    auto* lr_target = static_cast<value_t*>(grad_lr);
    const bool wide = has_wide_arrays(s, v, g, step, target) &&
                      has_wide_rows(lr_target, s.parameters, s.parameters);
    const auto run = wide ? backward<scalar_t, kAccess<scalar_t>> : backward<scalar_t, 1>;
    return run(s, v, g, step, target, lr_target, static_cast<value_t*>(workspace),
               static_cast<cudaStream_t>(stream));
  });
}

}  // namespace fastmeta
