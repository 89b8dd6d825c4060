#include <cmath>
#include <limits>

#include "common/cuda/block_products.cuh"
#include "common/cuda/launch.cuh"
#include "common/cuda/multiprocessors.cuh"
#include "common/cuda/workspace.h"
#include "ridge_head/ridge_head.h"

namespace fastmeta {
namespace {

constexpr int kRowsAtOnce = 8;  // of coefficients, in a thread's products with rows of features

// Operands of one task, names as in ridge_head.h, and its arrays in the workspace.
template <typename value_t>
struct Task {
  RidgeShape s;
  const value_t *x, *y, *weight;
  value_t l2, total;
  value_t *head, *intercept, *factor, *coefficients;
  value_t *mean_x, *mean_y, *rows, *targets;  // targets [S, N] are Y

  __device__ Task(const RidgeShape& shape, const RidgeOperands& o, value_t* scratch, int64_t t)
      : s(shape),
        x(at(o.x, t * s.examples * s.features)),
        y(at(o.y, t * s.examples * s.ways)),
        weight(at(o.weight, t * s.examples)),
        l2(*at(o.l2, t)),
        total(0),
        head(at(o.head, t * s.ways * s.features)),
        intercept(at(o.intercept, t * s.ways)),
        factor(at(o.factor, t * s.unknowns() * s.unknowns())),
        coefficients(at(o.coefficients, t * s.ways * s.examples)),
        mean_x(scratch),
        mean_y(mean_x + s.features),
        rows(mean_y + s.ways),
        targets(rows + s.examples * s.features) {
    for (int64_t i = 0; i < s.examples; ++i) total += weight[i];
  }

  static __device__ const value_t* at(const void* array, int64_t place) {
    return static_cast<const value_t*>(array) + place;
  }
  static __device__ value_t* at(void* array, int64_t place) {
    return static_cast<value_t*>(array) + place;
  }

  // Numbers of the workspace that the arrays above take.
  static FASTMETA_HOST_DEVICE int64_t scratch_size(const RidgeShape& s) {
    return (1 + s.examples) * (s.features + s.ways);
  }
};

// Writes the means, and the rows of X and Y. A thread owns a column. Ends with a barrier.
template <typename value_t>
__device__ void prepare(const Task<value_t>& task) {
  const auto prepare_rows = [&](const value_t* source, int64_t width, value_t* mean, value_t* out) {
    for_each(width, [&](int64_t d) {
      value_t sum = 0;
      for (int64_t i = 0; task.s.bias && task.total > 0 && i < task.s.examples; ++i) {
        // An absent example adds nothing, whatever it holds.
        if (task.weight[i] != 0) sum += task.weight[i] / task.total * source[i * width + d];
      }
      mean[d] = sum;
      for (int64_t i = 0; i < task.s.examples; ++i) {
        const value_t root = std::sqrt(task.weight[i]);
        out[i * width + d] = root == 0 ? value_t(0) : root * (source[i * width + d] - sum);
      }
    });
  };
  prepare_rows(task.x, task.s.features, task.mean_x, task.rows);
  prepare_rows(task.y, task.s.ways, task.mean_y, task.targets);
  __syncthreads();
}

// Turns the upper triangle of a [n, n] into U with a = U' U, the rest into zeros; NaN if a is
// singular. Begins with a barrier. A step divides a row, then subtracts its products.
template <typename value_t>
__device__ void factorise(value_t* a, int64_t n, value_t* least) {
  __syncthreads();
  for_each(n, [&](int64_t k) { least[k] = least_pivot(a[k * n + k], n); });
  for (int64_t k = 0; k < n; ++k) {
    value_t* row = a + k * n;
    __syncthreads();
    const value_t root =
        row[k] <= least[k] ? std::numeric_limits<value_t>::quiet_NaN() : std::sqrt(row[k]);
    __syncthreads();
    for_each(n, [&](int64_t j) {
      if (j < k) row[j] = 0;
      if (j == k) row[j] = root;
      if (j > k) row[j] /= root;
    });
    __syncthreads();
    const int64_t left = n - k - 1;
    for_each(left * left, [&](int64_t at) {
      const int64_t i = k + 1 + at / left, j = k + 1 + at % left;
      if (j >= i) a[i * n + j] -= row[i] * row[j];
    });
  }
}

// Replaces each of `count` rows b [n] by the solution z of U' U z = b; a thread owns a number of a
// row in each step. Begins and ends with a barrier.
template <typename value_t>
__device__ void solve(const value_t* factor, int64_t n, int64_t count, value_t* rows) {
  // Subtracts the part of unknown i, still times its pivot, from `others` numbers from `first` on.
  const auto eliminate = [&](int64_t i, int64_t first, int64_t others, int64_t row, int64_t step) {
    __syncthreads();
    const value_t pivot = factor[i * n + i];
    for_each(count * others, [&](int64_t at) {
      value_t* b = rows + at / others * n;
      const int64_t j = first + at % others;
      b[j] -= b[i] / pivot * factor[row + j * step];
    });
  };
  const auto divide = [&] {
    __syncthreads();
    for_each(count * n, [&](int64_t at) { rows[at] /= factor[at % n * (n + 1)]; });
  };
  for (int64_t i = 0; i + 1 < n; ++i) eliminate(i, i + 1, n - i - 1, i * n, 1);
  divide();
  for (int64_t i = n - 1; i > 0; --i) eliminate(i, 0, i, i, n);
  divide();
  __syncthreads();
}

// Calls store(n, d, sum over examples of a[n * step + s * stride] rows[s, d]) for every way and
// feature.
template <typename value_t, typename Store>
__device__ void combine_examples(const Task<value_t>& task, const value_t* a, int64_t stride,
                                 int64_t step, const Store& store) {
  const auto& s = task.s;
  for_each_column<kRowsAtOnce>(s.ways, s.features, [&](int64_t n, int live, int64_t d) {
    value_t sum[kRowsAtOnce] = {};
    add_column(sum, s.examples, s.features, a + n * step, stride, step, live, task.rows, d);
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      if (i < live) store(n + i, d, sum[i]);
    }
  });
}

// Adds to A along the vector sqrt(w), see ridge_head.h. Begins with a barrier.
template <typename value_t>
__device__ void add_along_weights(const Task<value_t>& task, value_t* system) {
  const int64_t n = task.s.examples;
  __syncthreads();
  value_t mean = 0;
  for (int64_t i = 0; i < n; ++i) mean += system[i * n + i] / n;
  __syncthreads();
  for_each(n * n, [&](int64_t at) {
    const value_t along = std::sqrt(task.weight[at / n] * task.weight[at % n]);
    system[at] += mean * along / task.total;
  });
}

// Writes A of ridge_head.h.
template <typename value_t>
__device__ void write_system(const Task<value_t>& task, value_t* system) {
  const auto& s = task.s;
  const int64_t n = s.unknowns();
  if (s.dual) {
    block_row_dots(n, n, s.features, task.rows, task.rows, [&](int64_t i, int64_t j, value_t dot) {
      const bool any_pivot = task.l2 == 0 && task.weight[i] == 0;
      system[i * n + j] = i != j ? dot : any_pivot ? value_t(1) : dot + task.l2;
    });
    if (task.l2 == 0 && s.bias && task.total > 0) add_along_weights(task, system);
    return;
  }
  for_each(n * n, [&](int64_t at) {
    const int64_t i = at / n, j = at % n;
    value_t sum = i == j ? task.l2 : value_t(0);
    for (int64_t e = 0; e < s.examples; ++e) sum += task.rows[e * n + i] * task.rows[e * n + j];
    system[at] = sum;
  });
}

// Work arrays of a task's fit.
template <typename value_t>
struct FitArrays {
  value_t* system;  // [n, n]: A, then U
  value_t* least;   // [n]
  value_t* solved;  // [N, S]: C
  value_t* heads;   // [N, D]: W

  __device__ FitArrays(const RidgeShape& s, value_t* scratch)
      : system(scratch),
        least(system + s.unknowns() * s.unknowns()),
        solved(least + s.unknowns()),
        heads(solved + s.ways * s.examples) {}

  static FASTMETA_HOST_DEVICE int64_t size(const RidgeShape& s) {
    return s.unknowns() * (s.unknowns() + 1) + s.ways * (s.examples + s.features);
  }
};

// The arrays of a block, in shared memory, or in global memory if they do not fit.
template <typename value_t>
__device__ value_t* arrays_of_block(value_t* global, int64_t size) {
  return global == nullptr ? dynamic_shared<value_t>() : global + blockIdx.x * size;
}

// Head, intercept, factor and coefficients. A block owns a task.
template <typename value_t>
__global__ void __launch_bounds__(kHeadThreads, 1)
    ridge_kernel(RidgeShape s, RidgeOperands operands, value_t* scratch, int64_t size) {
  value_t* own = arrays_of_block(scratch, size);
  const Task<value_t> task(s, operands, own, blockIdx.x);
  const FitArrays<value_t> fit(s, own + Task<value_t>::scratch_size(s));
  const int64_t n = s.unknowns();
  prepare(task);
  write_system(task, fit.system);
  factorise(fit.system, n, fit.least);
  const auto to_heads = [&](int64_t w, int64_t d, value_t sum) {
    fit.heads[w * s.features + d] = sum;
  };
  if (s.dual) {
    for_each(s.ways * s.examples, [&](int64_t at) {
      fit.solved[at] = task.targets[at % s.examples * s.ways + at / s.examples];
    });
    solve(fit.system, n, s.ways, fit.solved);
    combine_examples(task, fit.solved, 1, s.examples, to_heads);
    __syncthreads();
    for_each(s.ways * s.examples, [&](int64_t at) { task.coefficients[at] = fit.solved[at]; });
  } else {
    combine_examples(task, task.targets, s.ways, 1, to_heads);
    solve(fit.system, n, s.ways, fit.heads);
  }
  for_each(n * n, [&](int64_t at) { task.factor[at] = fit.system[at]; });
  for_each(s.ways * s.features, [&](int64_t at) { task.head[at] = fit.heads[at]; });
  for (int64_t w = threadIdx.x / kWarp; s.bias && w < s.ways; w += kHeadWarps) {
    const value_t moved = warp_dot(s.features, fit.heads + w * s.features, task.mean_x);
    if (threadIdx.x % kWarp == 0) task.intercept[w] = task.mean_y[w] - moved;
  }
}

// Work arrays of a task's gradient.
template <typename value_t>
struct Shares {
  value_t* v;          // [N, D]: P, then V, or l2 V in the dual form
  value_t* solved;     // [N, S]: U_d', or V X' in the primal form
  value_t* predicted;  // [N, S]: W X', in the primal form
  value_t* shares;     // [S, 2 N]: factors of rows of V and of W in grad_x

  __device__ Shares(const RidgeShape& s, value_t* scratch)
      : v(scratch),
        solved(v + s.ways * s.features),
        predicted(solved + s.ways * s.examples),
        shares(predicted + s.ways * s.examples) {}

  static FASTMETA_HOST_DEVICE int64_t size(const RidgeShape& s) {
    return s.ways * (s.features + 4 * s.examples);
  }
};

// Solves for V and U_d, and writes the gradient of l2. Begins and ends with a barrier.
template <typename value_t>
__device__ void solve_gradient(const Task<value_t>& task, const Shares<value_t>& of,
                               value_t* grad_l2) {
  const auto& s = task.s;
  const auto dots = [&](const value_t* heads, value_t* out) {
    block_row_dots(s.ways, s.examples, s.features, heads, task.rows,
                   [&](int64_t n, int64_t i, value_t dot) { out[n * s.examples + i] = dot; });
  };
  __syncthreads();
  if (s.dual) {
    dots(of.v, of.solved);
    solve(task.factor, s.examples, s.ways, of.solved);
    combine_examples(task, of.solved, 1, s.examples,
                     [&](int64_t n, int64_t d, value_t sum) { of.v[n * s.features + d] -= sum; });
  } else {
    solve(task.factor, s.features, s.ways, of.v);
    dots(of.v, of.solved);
    dots(task.head, of.predicted);
  }
  if (threadIdx.x < kWarp) {
    const value_t along = s.dual ? warp_dot(s.ways * s.examples, of.solved, task.coefficients)
                                 : warp_dot(s.ways * s.features, of.v, task.head);
    if (threadIdx.x == 0) *grad_l2 = -along;
  }
  __syncthreads();
}

// Returns <r, z> of example i, which has weight 0 and is in neither X nor Y. g: the upstream of the
// intercept, or null.
template <typename value_t>
__device__ value_t absent_weight(const Task<value_t>& task, const Shares<value_t>& of,
                                 const value_t* g, int64_t i) {
  const auto& s = task.s;
  value_t grad_weight = 0;
  for (int64_t n = 0; n < s.ways; ++n) {
    value_t residual = task.y[i * s.ways + n] - task.mean_y[n], along = 0;
    for (int64_t d = 0; d < s.features; ++d) {
      const value_t x = task.x[i * s.features + d] - task.mean_x[d];
      residual -= x * task.head[n * s.features + d];
      along += x * of.v[n * s.features + d];
    }
    if (s.dual) along /= task.l2;
    grad_weight += residual * (along + (g == nullptr ? value_t(0) : g[n] / task.total));
  }
  return grad_weight;
}

// Writes grad_y of example i and its factors in grad_x, and returns grad_weight.
template <typename value_t>
__device__ value_t write_shares(const Task<value_t>& task, const Shares<value_t>& of,
                                const value_t* g, int64_t i, value_t* grad_y) {
  const auto& s = task.s;
  const value_t weight = task.weight[i], root = std::sqrt(weight);
  value_t *of_v = of.shares + i * 2 * s.ways, *of_w = of_v + s.ways;
  value_t grad_weight = 0;
  for (int64_t n = 0; n < s.ways; ++n) {
    const int64_t at = n * s.examples + i;
    if (weight == 0) {
      of_v[n] = of_w[n] = grad_y[n] = 0;
      continue;
    }
    const value_t z = of.solved[at] / root + (g == nullptr ? value_t(0) : g[n] / task.total);
    const value_t residual = s.dual ? task.l2 * task.coefficients[at] / root
                                    : (task.targets[i * s.ways + n] - of.predicted[at]) / root;
    of_v[n] = s.dual ? root * task.coefficients[at] : weight * residual;
    grad_y[n] = weight * z;
    of_w[n] = -grad_y[n];
    grad_weight += residual * z;
  }
  return weight == 0 ? absent_weight(task, of, g, i) : grad_weight;
}

// The gradients. A block owns a task, a thread an example's shares or a feature of some examples.
template <typename value_t>
__global__ void __launch_bounds__(kHeadThreads, 1)
    ridge_backward_kernel(RidgeShape s, RidgeOperands operands, RidgeGradients gradients,
                          value_t* scratch, int64_t size) {
  using OfTask = Task<value_t>;
  const int64_t t = blockIdx.x;
  value_t* own = arrays_of_block(scratch, size);
  const OfTask task(s, operands, own, t);
  const Shares<value_t> of(s, own + OfTask::scratch_size(s));
  const value_t* upstream = OfTask::at(gradients.upstream_head, t * s.ways * s.features);
  const value_t* g = s.bias ? OfTask::at(gradients.upstream_intercept, t * s.ways) : nullptr;
  prepare(task);
  for_each(s.ways * s.features, [&](int64_t at) {
    const value_t moved =
        g == nullptr ? value_t(0) : g[at / s.features] * task.mean_x[at % s.features];
    of.v[at] = upstream[at] - moved;
  });
  solve_gradient(task, of, OfTask::at(gradients.l2, t));
  if (!(task.total > 0)) g = nullptr;
  for_each(s.examples, [&](int64_t i) {
    value_t* grad_y = OfTask::at(gradients.y, (t * s.examples + i) * s.ways);
    OfTask::at(gradients.weight, t * s.examples)[i] = write_shares(task, of, g, i, grad_y);
  });
  __syncthreads();
  value_t* grad_x = OfTask::at(gradients.x, t * s.examples * s.features);
  for_each_column<kRowsAtOnce>(s.examples, s.features, [&](int64_t row, int live, int64_t d) {
    value_t sum[kRowsAtOnce] = {};
    const value_t* shares = of.shares + row * 2 * s.ways;
    add_column(sum, s.ways, s.features, shares, 1, 2 * s.ways, live, of.v, d);
    add_column(sum, s.ways, s.features, shares + s.ways, 1, 2 * s.ways, live, task.head, d);
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      if (i < live) grad_x[(row + i) * s.features + d] = sum[i];
    }
  });
}

int64_t forward_size(const RidgeShape& s) {
  return Task<float>::scratch_size(s) + FitArrays<float>::size(s);
}

int64_t backward_size(const RidgeShape& s) {
  return Task<float>::scratch_size(s) + Shares<float>::size(s);
}

// Bytes of the arrays of a block that lie in shared memory: all or none.
size_t shared_bytes(Dtype dtype, int64_t size) {
  const size_t bytes = size * (dtype == Dtype::kDouble ? sizeof(double) : sizeof(float));
  return bytes <= static_cast<size_t>(largest_shared_memory()) ? bytes : 0;
}

int64_t workspace_bytes(Dtype dtype, int64_t tasks, int64_t size) {
  if (shared_bytes(dtype, size) > 0) return 0;
  return tasks * size *
         static_cast<int64_t>(dtype == Dtype::kDouble ? sizeof(double) : sizeof(float));
}

// Calls run(value_t()) for the element type.
template <typename Run>
int with_wide(Dtype dtype, const Run& run) {
  return dtype == Dtype::kDouble ? run(double()) : run(float());
}

}  // namespace

int64_t ridge_head_workspace(Dtype dtype, const RidgeShape& shape) {
  return workspace_bytes(dtype, shape.tasks, forward_size(shape));
}

int launch_ridge_head(Dtype dtype, const RidgeShape& shape, const RidgeOperands& operands,
                      void* workspace, void* stream) {
  return with_wide(dtype, [&](auto zero) -> int {
    using value_t = decltype(zero);
    const int64_t size = forward_size(shape);
    const size_t shared = shared_bytes(dtype, size);
    return launch(ridge_kernel<value_t>, shape.tasks, kHeadThreads, shared,
                  static_cast<cudaStream_t>(stream), shape, operands,
                  shared > 0 ? nullptr : static_cast<value_t*>(workspace), size);
  });
}

int64_t ridge_head_backward_workspace(Dtype dtype, const RidgeShape& shape) {
  return workspace_bytes(dtype, shape.tasks, backward_size(shape));
}

int launch_ridge_head_backward(Dtype dtype, const RidgeShape& shape, const RidgeOperands& operands,
                               const RidgeGradients& gradients, void* workspace, void* stream) {
  return with_wide(dtype, [&](auto zero) -> int {
    using value_t = decltype(zero);
    const int64_t size = backward_size(shape);
    const size_t shared = shared_bytes(dtype, size);
    return launch(ridge_backward_kernel<value_t>, shape.tasks, kHeadThreads, shared,
                  static_cast<cudaStream_t>(stream), shape, operands, gradients,
                  shared > 0 ? nullptr : static_cast<value_t*>(workspace), size);
  });
}

}  // namespace fastmeta
