#include <cmath>
#include <limits>

#include "common/launch.cuh"
#include "common/multiprocessors.cuh"
#include "common/workspace.h"
#include "linear_head/block_products.cuh"
#include "linear_head/linear_head.h"

namespace fastmeta {
namespace {

constexpr int kRows = 8;  // of a tile of coefficients by features

// One task, names as in linear_head.h.
template <typename scalar_t>
struct Task {
  using value_t = acc_t<scalar_t>;
  LinearHeadShape s;
  LinearHeadOptions o;
  value_t factor, weight_decay;
  const scalar_t *x, *weight, *bias, *targets;
  const int64_t* labels;
  const value_t* lr;
  value_t *predictions, *products;

  __device__ int64_t lanes() const { return s.ways * s.support; }
  __device__ int64_t head() const { return s.ways * s.features; }
  __device__ value_t decay(int64_t k) const { return 1 - lr[k] * weight_decay; }
  __device__ value_t* path(int64_t k) const { return products + (k - 1) * head(); }
  // y[n, i], NaN for a label out of range.
  __device__ value_t wanted(int64_t n, int64_t i) const {
    if (o.loss == HeadLoss::kMse) return widen(targets[i * s.ways + n]);
    const int64_t label = labels[i];
    const int64_t classes = o.loss == HeadLoss::kLogistic ? 2 : s.ways;
    if (label < 0 || label >= classes) return std::numeric_limits<value_t>::quiet_NaN();
    return o.loss == HeadLoss::kLogistic ? value_t(label) : value_t(label == n ? 1 : 0);
  }
};

// Operands of all tasks.
template <typename scalar_t>
struct Tasks {
  Task<scalar_t> first;
  int64_t weight_stride;

  __device__ Task<scalar_t> operator[](int64_t t) const {
    Task<scalar_t> task = first;
    const auto& s = first.s;
    task.x += t * s.support * s.features;
    task.weight += t * weight_stride;
    if (task.bias != nullptr) task.bias += t * s.ways;
    if (task.targets != nullptr) task.targets += t * s.support * s.ways;
    if (task.labels != nullptr) task.labels += t * s.support;
    task.lr += t * s.steps;
    task.predictions += t * s.steps * s.ways * s.support;
    task.products += t * (first.o.dual ? s.support * s.support : s.steps * s.ways * s.features);
    return task;
  }
};

// The arrays of a block, in shared memory, or where they do not fit in global memory.
template <typename value_t>
struct Scratch {
  int64_t size = 0;
  value_t* base;

  FASTMETA_HOST_DEVICE value_t* take(int64_t count) {
    size += count;
    return base + size - count;
  }
};

template <typename value_t>
__device__ Scratch<value_t> scratch_of_block(value_t* global, int64_t size) {
  return {0, global == nullptr ? dynamic_shared<value_t>() : global + blockIdx.x * size};
}

// Calls body(i) for every i below count: a thread owns some.
template <typename Body>
__device__ void for_each(int64_t count, const Body& body) {
  for (int64_t i = threadIdx.x; i < count; i += kHeadThreads) body(i);
}

template <typename value_t>
__device__ value_t row_sum(const value_t* row, int64_t count) {
  value_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += row[i];
  return sum;
}

// (X head' + bias)' [N, S], for heads of any kind; bias may be null.
template <typename scalar_t>
__device__ void outputs_of(const Task<scalar_t>& task, const scalar_t* weight, const scalar_t* bias,
                           acc_t<scalar_t>* out) {
  const auto& s = task.s;
  block_row_dots(s.ways, s.support, s.features, weight, task.x, [&](int64_t n, int64_t i, auto z) {
    out[n * s.support + i] = bias == nullptr ? z : z + widen(bias[n]);
  });
}

// out = share base + ((X X' + 1) c)' [N, S], c [N, S]; where no thread still reads out. In the dual
// gram is X X' + 1, in the primal path is c X.
template <typename scalar_t>
__device__ void set_product(const Task<scalar_t>& task, acc_t<scalar_t> share,
                            const acc_t<scalar_t>* base, const acc_t<scalar_t>* c,
                            const acc_t<scalar_t>* gram, const acc_t<scalar_t>* path,
                            acc_t<scalar_t>* out) {
  const auto& s = task.s;
  if (task.o.dual) {
    for_each(task.lanes(), [&](int64_t at) {
      const int64_t n = at / s.support, i = at % s.support;
      acc_t<scalar_t> sum = share * base[at];
      for (int64_t j = 0; j < s.support; ++j) {
        sum += c[n * s.support + j] * gram[j * s.support + i];
      }
      out[at] = sum;
    });
    return;
  }
  block_row_dots(s.ways, s.support, s.features, path, task.x, [&](int64_t n, int64_t i, auto z) {
    const int64_t at = n * s.support + i;
    const auto of_bias = task.o.has_bias ? row_sum(c + n * s.support, s.support) : 0;
    out[at] = share * base[at] + z + of_bias;
  });
}

// out [N, D] = share base + factor c X, c [N, S]; base may be null.
template <typename scalar_t, typename base_t, typename out_t>
__device__ void combine_examples(const Task<scalar_t>& task, acc_t<scalar_t> share,
                                 const base_t* base, acc_t<scalar_t> factor,
                                 const acc_t<scalar_t>* c, out_t* out) {
  const auto& s = task.s;
  for_each_column<kRows>(s.ways, s.features, [&](int64_t row, int live, int64_t d) {
    acc_t<scalar_t> sum[kRows] = {};
    add_column(sum, s.support, s.features, c + row * s.support, 1, s.support, live, task.x, d);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (i >= live) continue;
      const int64_t at = (row + i) * s.features + d;
      const auto start = base == nullptr ? 0 : share * widen(base[at]);
      out[at] = narrow<out_t>(start + factor * sum[i]);
    }
  });
}

// For the owner of example i: predictions in place of outputs z [N, S].
template <typename scalar_t>
__device__ void predict(const Task<scalar_t>& task, acc_t<scalar_t>* z, int64_t i) {
  using value_t = acc_t<scalar_t>;
  const int64_t step = task.s.support;
  if (task.o.loss == HeadLoss::kLogistic) z[i] = 1 / (1 + std::exp(-z[i]));
  if (task.o.loss != HeadLoss::kCrossEntropy) return;
  value_t largest = z[i], sum = 0;
  for (int64_t n = 1; n < task.s.ways; ++n) {
    largest = largest < z[n * step + i] ? z[n * step + i] : largest;
  }
  for (int64_t n = 0; n < task.s.ways; ++n) {
    z[n * step + i] = std::exp(z[n * step + i] - largest);
    sum += z[n * step + i];
  }
  for (int64_t n = 0; n < task.s.ways; ++n) z[n * step + i] /= sum;
}

// For the owner of example i: out = J v, of predictions p.
template <typename scalar_t>
__device__ void curve(const Task<scalar_t>& task, const acc_t<scalar_t>* p, acc_t<scalar_t> scale,
                      const acc_t<scalar_t>* v, acc_t<scalar_t>* out, int64_t i) {
  using value_t = acc_t<scalar_t>;
  const int64_t step = task.s.support;
  value_t mean = 0;
  for (int64_t n = 0; task.o.loss == HeadLoss::kCrossEntropy && n < task.s.ways; ++n) {
    mean += p[n * step + i] * v[n * step + i];
  }
  for (int64_t n = 0; n < task.s.ways; ++n) {
    const int64_t at = n * step + i;
    value_t along = v[at];
    if (task.o.loss == HeadLoss::kCrossEntropy) along = p[at] * (v[at] - mean);
    if (task.o.loss == HeadLoss::kLogistic) along = p[at] * (1 - p[at]) * v[at];
    out[at] = task.factor * scale * along;
  }
}

template <typename value_t>
FASTMETA_HOST_DEVICE int64_t forward_scratch(const LinearHeadShape& s, bool dual) {
  return 3 * s.ways * s.support + (dual ? s.support * s.support : 0);
}

// A head after K steps. A block owns a task: a warp a tile of dot products, a thread an example of
// the softmax or features of the head. Sums in acc_t; C, Z and the Gram matrix lie in shared memory,
// predictions and products go to memory for the backward pass.
template <typename scalar_t>
__global__ void __launch_bounds__(kHeadThreads)
    head_kernel(Tasks<scalar_t> tasks, scalar_t* weights, scalar_t* biases,
                acc_t<scalar_t>* global_scratch) {
  using value_t = acc_t<scalar_t>;
  const auto task = tasks[blockIdx.x];
  const auto& s = task.s;
  auto scratch = scratch_of_block(global_scratch, forward_scratch<value_t>(s, task.o.dual));
  value_t *start = scratch.take(task.lanes()), *z = scratch.take(task.lanes());
  value_t *c = scratch.take(task.lanes()), *gram = scratch.take(0);
  outputs_of(task, task.weight, task.bias, start);
  if (task.o.dual) {
    const value_t one = task.o.has_bias ? 1 : 0;
    block_row_dots(s.support, s.support, s.features, task.x, task.x,
                   [&](int64_t i, int64_t j, value_t product) {
                     gram[i * s.support + j] = product + one;
                     task.products[i * s.support + j] = product + one;
                   });
  }
  for_each(task.lanes(), [&](int64_t i) { c[i] = 0; });
  value_t share = 1;
  for (int64_t k = 0; k < s.steps; ++k) {
    __syncthreads();
    if (k == 0) {
      for_each(task.lanes(), [&](int64_t i) { z[i] = start[i]; });
    } else {
      set_product(task, share, start, c, gram, task.path(k), z);
    }
    __syncthreads();
    value_t* predictions = task.predictions + k * task.lanes();
    for_each(s.support, [&](int64_t i) {
      predict(task, z, i);
      for (int64_t n = 0; n < s.ways; ++n) {
        const int64_t at = n * s.support + i;
        predictions[at] = z[at];
        z[at] = task.factor * (z[at] - task.wanted(n, i));  // G_k
        c[at] = task.decay(k) * c[at] - task.lr[k] * z[at];
      }
    });
    if (!task.o.dual) {
      __syncthreads();
      const value_t* before = k == 0 ? nullptr : task.path(k);
      combine_examples(task, task.decay(k), before, -task.lr[k], z, task.path(k + 1));
    }
    share *= task.decay(k);
  }
  __syncthreads();
  combine_examples(task, share, task.weight, value_t(1), c, weights + blockIdx.x * task.head());
  for_each(task.o.has_bias ? s.ways : 0, [&](int64_t n) {
    const value_t bias = share * widen(task.bias[n]) + row_sum(c + n * s.support, s.support);
    biases[blockIdx.x * s.ways + n] = narrow<scalar_t>(bias);
  });
}

// Upstream and gradients of all tasks; null where there is none.
template <typename scalar_t>
struct Backward {
  using value_t = acc_t<scalar_t>;
  const scalar_t *weight, *bias;
  bool first_order;
  scalar_t *grad_x, *grad_weight, *grad_bias, *grad_targets;
  value_t* grad_lr;
  value_t *paths, *global_scratch;  // Q_k [T, K, N, D] of the primal
};

// Of C_0 .. C_K, G_k, Y_k, c_0 .. c_K; R, its next, Y, Z_0; X X' + 1 and the pairs.
template <typename value_t>
FASTMETA_HOST_DEVICE int64_t backward_scratch(const LinearHeadShape& s, bool dual) {
  return (3 * s.steps + 5) * s.ways * s.support + s.steps + 1 +
         (dual ? 2 * s.support * s.support : 0);
}

// grad_x [S, D] = Y W + C_K V + the pairs, see linear_head.h.
template <typename scalar_t>
__device__ void write_grad_x(const Task<scalar_t>& task, const acc_t<scalar_t>* sum,
                             const acc_t<scalar_t>* coefficients, const acc_t<scalar_t>* adjoints,
                             const acc_t<scalar_t>* pairs, const acc_t<scalar_t>* paths,
                             const scalar_t* upstream, scalar_t* out) {
  const auto& s = task.s;
  const int64_t later = (s.steps - 1) * s.ways, lanes = task.lanes();
  const auto* last = coefficients + s.steps * lanes;
  for_each_column<kRows>(s.support, s.features, [&](int64_t row, int live, int64_t d) {
    acc_t<scalar_t> of[kRows] = {};
    add_column(of, s.ways, s.features, sum + row, s.support, 1, live, task.weight, d);
    add_column(of, s.ways, s.features, last + row, s.support, 1, live, upstream, d);
    if (s.steps > 1 && task.o.dual) {
      add_column(of, s.support, s.features, pairs + row, s.support, 1, live, task.x, d);
    } else if (s.steps > 1) {
      add_column(of, later, s.features, adjoints + lanes + row, s.support, 1, live, task.path(1),
                 d);
      add_column(of, later, s.features, coefficients + lanes + row, s.support, 1, live,
                 paths + task.head(), d);
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (i < live) out[(row + i) * s.features + d] = narrow<scalar_t>(of[i]);
    }
  });
}

// The adjoint of head_kernel, with the same owners. The first warp has the scalars: the gradients of
// step sizes, and the adjoint e of the share of the start.
template <typename scalar_t>
__global__ void __launch_bounds__(kHeadThreads)
    head_backward_kernel(Tasks<scalar_t> tasks, Backward<scalar_t> b) {
  using value_t = acc_t<scalar_t>;
  const auto task = tasks[blockIdx.x];
  const auto& s = task.s;
  const int64_t lanes = task.lanes(), t = blockIdx.x;
  auto scratch = scratch_of_block(b.global_scratch, backward_scratch<value_t>(s, task.o.dual));
  value_t* coefficients = scratch.take((s.steps + 1) * lanes);
  value_t *residuals = scratch.take(s.steps * lanes), *adjoints = scratch.take(s.steps * lanes);
  value_t *adjoint = scratch.take(lanes), *next = scratch.take(lanes);
  value_t *sum = scratch.take(lanes), *start = scratch.take(lanes);
  value_t *shares = scratch.take(s.steps + 1), *gram = nullptr, *pairs = nullptr;
  if (task.o.dual) {
    gram = scratch.take(s.support * s.support);
    pairs = scratch.take(s.support * s.support);
    for_each(s.support * s.support, [&](int64_t i) { gram[i] = task.products[i]; });
  }
  value_t* paths = b.paths == nullptr ? nullptr : b.paths + t * s.steps * task.head();
  const scalar_t* upstream = b.weight + t * task.head();
  const scalar_t* upstream_bias = task.o.has_bias ? b.bias + t * s.ways : nullptr;
  const bool is_first_warp = threadIdx.x < kWarp, decays = task.weight_decay != 0;

  outputs_of(task, upstream, upstream_bias, adjoint);
  if (decays) outputs_of(task, task.weight, task.bias, start);
  if (threadIdx.x == 0) {
    shares[0] = 1;
    for (int64_t k = 0; k < s.steps; ++k) shares[k + 1] = task.decay(k) * shares[k];
  }
  for_each(s.support, [&](int64_t i) {
    for (int64_t n = 0; n < s.ways; ++n) {
      const int64_t at = n * s.support + i;
      const value_t wanted = task.wanted(n, i);
      sum[at] = coefficients[at] = 0;
      for (int64_t k = 0; k < s.steps; ++k) {
        const value_t g = task.factor * (task.predictions[k * lanes + at] - wanted);
        residuals[k * lanes + at] = g;
        coefficients[(k + 1) * lanes + at] =
            task.decay(k) * coefficients[k * lanes + at] - task.lr[k] * g;
      }
    }
  });
  value_t start_adjoint = 0;
  if (is_first_warp && decays) {
    start_adjoint = warp_dot(task.head(), upstream, task.weight);
    if (task.o.has_bias) start_adjoint += warp_dot(s.ways, upstream_bias, task.bias);
  }

  for (int64_t k = s.steps - 1; k >= 0; --k) {
    __syncthreads();
    const value_t *c = coefficients + k * lanes, *g = residuals + k * lanes;
    value_t* y = adjoints + k * lanes;
    if (is_first_warp) {
      value_t of_lr = -warp_dot(lanes, adjoint, g);
      if (decays) {
        of_lr -= task.weight_decay * (warp_dot(lanes, adjoint, c) + shares[k] * start_adjoint);
        start_adjoint *= task.decay(k);
      }
      if (threadIdx.x == 0) b.grad_lr[t * s.steps + k] = of_lr;
    }
    for_each(s.support, [&](int64_t i) {
      if (!b.first_order) {
        curve(task, task.predictions + k * lanes, -task.lr[k], adjoint, y, i);
      }
      for (int64_t n = 0; n < s.ways; ++n) {
        const int64_t at = n * s.support + i;
        if (b.first_order) y[at] = 0;
        sum[at] += shares[k] * y[at];
      }
    });
    __syncthreads();
    if (is_first_warp && decays) start_adjoint += warp_dot(lanes, y, start);
    if (k == 0) break;
    if (b.first_order) {
      for_each(lanes, [&](int64_t i) { next[i] = task.decay(k) * adjoint[i]; });
    } else {
      value_t* path = paths == nullptr ? nullptr : paths + k * task.head();
      if (!task.o.dual) {
        combine_examples(task, value_t(0), static_cast<const value_t*>(nullptr), value_t(1), y,
                         path);
        __syncthreads();
      }
      set_product(task, task.decay(k), adjoint, y, gram, path, next);
    }
    value_t* swapped = adjoint;
    adjoint = next;
    next = swapped;
  }

  __syncthreads();
  combine_examples(task, shares[s.steps], upstream, value_t(1), sum,
                   b.grad_weight + t * task.head());
  for_each(task.o.has_bias ? s.ways : 0, [&](int64_t n) {
    const value_t bias =
        shares[s.steps] * widen(upstream_bias[n]) + row_sum(sum + n * s.support, s.support);
    b.grad_bias[t * s.ways + n] = narrow<scalar_t>(bias);
  });
  for_each(b.grad_targets == nullptr ? 0 : lanes, [&](int64_t at) {
    const int64_t n = at / s.support, i = at % s.support;
    value_t of_targets = 0;
    for (int64_t k = 0; k < s.steps; ++k) of_targets -= adjoints[k * lanes + at];
    b.grad_targets[(t * s.support + i) * s.ways + n] = narrow<scalar_t>(of_targets);
  });
  if (b.grad_x == nullptr) return;
  for_each(pairs == nullptr ? 0 : s.support * s.support, [&](int64_t at) {
    const int64_t i = at / s.support, j = at % s.support;
    value_t pair = 0;
    for (int64_t r = s.ways; r < s.steps * s.ways; ++r) {
      const value_t *y = adjoints + r * s.support, *c = coefficients + r * s.support;
      pair += y[i] * c[j] + c[i] * y[j];
    }
    pairs[at] = pair;
  });
  __syncthreads();
  write_grad_x(task, sum, coefficients, adjoints, pairs, paths, upstream,
               b.grad_x + t * s.support * s.features);
}

template <typename scalar_t>
Tasks<scalar_t> tasks_of(const LinearHeadOperands& o) {
  using value_t = acc_t<scalar_t>;
  const Task<scalar_t> first{o.shape,
                             o.options,
                             static_cast<value_t>(residual_factor(o.options.loss, o.shape)),
                             static_cast<value_t>(o.options.weight_decay),
                             static_cast<const scalar_t*>(o.x),
                             static_cast<const scalar_t*>(o.weight),
                             static_cast<const scalar_t*>(o.bias),
                             static_cast<const scalar_t*>(o.targets),
                             o.labels,
                             static_cast<const value_t*>(o.lr),
                             static_cast<value_t*>(o.predictions),
                             static_cast<value_t*>(o.products)};
  return {first, o.weight_stride};
}

// Where a block's arrays go: shared bytes, or a part of the workspace for each task.
template <typename value_t>
struct Place {
  size_t shared_bytes;
  value_t* global;

  Place(int64_t size, int64_t tasks, Workspace& space) {
    const bool fits = size * sizeof(value_t) <= static_cast<size_t>(largest_shared_memory());
    shared_bytes = fits ? size * sizeof(value_t) : 0;
    global = fits ? nullptr : space.take<value_t>(size * tasks);
  }
};

template <typename scalar_t>
Place<acc_t<scalar_t>> forward_place(const LinearHeadOperands& o, Workspace& space) {
  using value_t = acc_t<scalar_t>;
  return {forward_scratch<value_t>(o.shape, o.options.dual), o.shape.tasks, space};
}

template <typename scalar_t>
Place<acc_t<scalar_t>> backward_place(const LinearHeadOperands& o, Workspace& space) {
  using value_t = acc_t<scalar_t>;
  return {backward_scratch<value_t>(o.shape, o.options.dual), o.shape.tasks, space};
}

template <typename value_t>
value_t* take_paths(const LinearHeadOperands& o, Workspace& space) {
  const auto& s = o.shape;
  return o.options.dual ? nullptr : space.take<value_t>(s.tasks * s.steps * s.ways * s.features);
}

}  // namespace

int64_t linear_head_workspace(const LinearHeadOperands& operands) {
  Workspace space(nullptr);
  with_dtype(operands.dtype,
             [&](auto type) { forward_place<typename decltype(type)::type>(operands, space); });
  return space.bytes();
}

int launch_linear_head(const LinearHeadOperands& operands, void* weight, void* bias,
                       void* workspace, void* stream) {
  return with_dtype(operands.dtype, [&](auto type) -> int {
    using scalar_t = typename decltype(type)::type;
    Workspace space(workspace);
    const auto place = forward_place<scalar_t>(operands, space);
    return launch(head_kernel<scalar_t>, operands.shape.tasks, kHeadThreads, place.shared_bytes,
                  static_cast<cudaStream_t>(stream), tasks_of<scalar_t>(operands),
                  static_cast<scalar_t*>(weight), static_cast<scalar_t*>(bias), place.global);
  });
}

int64_t linear_head_backward_workspace(const LinearHeadOperands& operands) {
  Workspace space(nullptr);
  with_dtype(operands.dtype, [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    backward_place<scalar_t>(operands, space);
    take_paths<acc_t<scalar_t>>(operands, space);
  });
  return space.bytes();
}

int launch_linear_head_backward(const LinearHeadOperands& operands,
                                const LinearHeadUpstream& upstream,
                                const LinearHeadGradients& gradients, void* workspace,
                                void* stream) {
  return with_dtype(operands.dtype, [&](auto type) -> int {
    using scalar_t = typename decltype(type)::type;
    using value_t = acc_t<scalar_t>;
    Workspace space(workspace);
    const auto place = backward_place<scalar_t>(operands, space);
    const Backward<scalar_t> backward{static_cast<const scalar_t*>(upstream.weight),
                                      static_cast<const scalar_t*>(upstream.bias),
                                      upstream.first_order,
                                      static_cast<scalar_t*>(gradients.x),
                                      static_cast<scalar_t*>(gradients.weight),
                                      static_cast<scalar_t*>(gradients.bias),
                                      static_cast<scalar_t*>(gradients.targets),
                                      static_cast<value_t*>(gradients.lr),
                                      take_paths<value_t>(operands, space),
                                      place.global};
    return launch(head_backward_kernel<scalar_t>, operands.shape.tasks, kHeadThreads,
                  place.shared_bytes, static_cast<cudaStream_t>(stream),
                  tasks_of<scalar_t>(operands), backward);
  });
}

}  // namespace fastmeta
