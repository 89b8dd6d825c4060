#include "common/cuda/launch.cuh"
#include "common/cuda/multiprocessors.cuh"
#include "common/cuda/workspace.h"
#include "linear_head/block_head.cuh"

namespace fastmeta {
namespace {

using namespace block_head;

// Head after K steps. A block owns a task: a warp a tile of dot products, a thread an example of
// the softmax or features of the head. Sums in acc_t; C, Z and the Gram matrix lie in shared
// memory, predictions and products go to global memory for the backward pass.
template <typename scalar_t>
__global__ void __launch_bounds__(kHeadThreads)
    head_kernel(Tasks<scalar_t> tasks, scalar_t* weights, scalar_t* biases,
                acc_t<scalar_t>* global_scratch) {
  using value_t = acc_t<scalar_t>;
  const auto task = tasks[blockIdx.x];
  const auto& s = task.s;
  auto scratch = scratch_of_block(global_scratch, forward_scratch<value_t>(s, task.o.dual));
  value_t *start = scratch.take(task.lanes()), *z = scratch.take(task.lanes());
  // The Gram matrix comes last: its size depends on the form, and take(0) only asks for its
  // address.
  value_t *c = scratch.take(task.lanes()), *gram = scratch.take(0);
  outputs_of(task, task.weight, task.bias, start);
  if (task.o.dual) {
    // The bias is one more feature, always 1, of every example.
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
      // For k = 0 the coefficients are 0 and the primal has no path yet.
      set_product(task, share, start, c, gram, task.path(k), z);
    }
    __syncthreads();
    // A thread owns an example from here to the coefficients: the softmax needs no barrier.
    value_t* predictions = task.predictions + k * task.lanes();
    for_each(s.support, [&](int64_t i) {
      predict(task, z, i);
      const value_t factor = task.factor_of(i);
      for (int64_t n = 0; n < s.ways; ++n) {
        const int64_t at = n * s.support + i;
        predictions[at] = z[at];
        z[at] = factor * (z[at] - task.wanted(n, i));  // G_k
        c[at] = task.decay(k) * c[at] - task.lr[k] * z[at];
      }
    });
    if (!task.o.dual) {
      __syncthreads();
      // P_0 = 0 is not stored.
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

// Upstream and gradients of all tasks; null if absent.
template <typename scalar_t>
struct Backward {
  using value_t = acc_t<scalar_t>;
  const scalar_t *weight, *bias;
  bool first_order;
  scalar_t *grad_x, *grad_weight, *grad_bias, *grad_targets;
  value_t* grad_lr;
  value_t *paths, *global_scratch;  // Q_k [T, K, N, D] of the primal
};

// Sizes: of C_0 .. C_K, G_k, Y_k, c_0 .. c_K; R, its next, Y, Z_0; X X' + 1 and the pairs.
template <typename value_t>
FASTMETA_HOST_DEVICE int64_t backward_scratch(const LinearHeadShape& s, bool dual) {
  return (3 * s.steps + 5) * s.ways * s.support + s.steps + 1 +
         (dual ? 2 * s.support * s.support : 0);
}

// Computes grad_x [S, D] = Y W + C_K V + the pairs, see linear_head.h.
template <typename scalar_t>
__device__ void write_grad_x(const Task<scalar_t>& task, const acc_t<scalar_t>* sum,
                             const acc_t<scalar_t>* coefficients, const acc_t<scalar_t>* adjoints,
                             const acc_t<scalar_t>* pairs, const acc_t<scalar_t>* paths,
                             const scalar_t* upstream, scalar_t* out) {
  const auto& s = task.s;
  // Steps 1 .. K - 1 as one sum: step 0 has C_0 = 0 and contributes no pair.
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

// Adjoint of head_kernel, of at least one step, with the same owners. The first warp owns the
// scalars: the gradients of step sizes, and the adjoint e of the share of the start.
template <typename scalar_t>
__global__ void __launch_bounds__(kHeadThreads)
    head_backward_kernel(Tasks<scalar_t> tasks, Backward<scalar_t> b) {
  using value_t = acc_t<scalar_t>;
  const auto task = tasks[blockIdx.x];
  const auto& s = task.s;
  const int t = blockIdx.x, lanes = static_cast<int>(task.lanes());
  const int steps = static_cast<int>(s.steps), support = static_cast<int>(s.support);
  const int ways = static_cast<int>(s.ways);
  auto scratch = scratch_of_block(b.global_scratch, backward_scratch<value_t>(s, task.o.dual));
  value_t* coefficients = scratch.take((steps + 1) * lanes);
  value_t *residuals = scratch.take(steps * lanes), *adjoints = scratch.take(steps * lanes);
  value_t *adjoint = scratch.take(lanes), *next = scratch.take(lanes);
  value_t *sum = scratch.take(lanes), *start = scratch.take(lanes);
  value_t *shares = scratch.take(steps + 1), *gram = nullptr, *pairs = nullptr;
  if (task.o.dual) {
    gram = scratch.take(support * support);
    pairs = scratch.take(support * support);
    for_each(support * support, [&](int i) { gram[i] = task.products[i]; });
  }
  value_t* paths = b.paths == nullptr ? nullptr : b.paths + t * steps * task.head();
  const scalar_t* upstream = b.weight + t * task.head();
  const scalar_t* upstream_bias = task.o.has_bias ? b.bias + t * ways : nullptr;
  const bool is_first_warp = threadIdx.x < kWarp, decays = task.weight_decay != 0;

  outputs_of(task, upstream, upstream_bias, adjoint);
  if (decays) outputs_of(task, task.weight, task.bias, start);
  if (threadIdx.x == 0) {
    // One thread: a chain of `steps` products is too short to share.
    shares[0] = 1;
    for (int k = 0; k < steps; ++k) shares[k + 1] = task.decay(k) * shares[k];
  }
  for_each(support, [&](int i) {
    const value_t factor = task.factor_of(i);
    for (int n = 0; n < ways; ++n) {
      const int at = n * support + i;
      const value_t wanted = task.wanted(n, i);
      // Recomputes C_k and G_k from the kept predictions: cheaper than keeping them too.
      sum[at] = coefficients[at] = 0;
      for (int k = 0; k < steps; ++k) {
        const value_t g = factor * (task.predictions[k * lanes + at] - wanted);
        residuals[k * lanes + at] = g;
        coefficients[(k + 1) * lanes + at] =
            task.decay(k) * coefficients[k * lanes + at] - task.lr[k] * g;
      }
    }
  });
  // Without weight decay the share stays 1, and its adjoint is not needed.
  value_t start_adjoint = 0;
  if (is_first_warp && decays) {
    start_adjoint = warp_dot(task.head(), upstream, task.weight);
    if (task.o.has_bias) start_adjoint += warp_dot(ways, upstream_bias, task.bias);
  }

  for (int k = steps - 1; k >= 0; --k) {
    __syncthreads();
    const value_t *c = coefficients + k * lanes, *g = residuals + k * lanes;
    value_t* y = adjoints + k * lanes;
    if (is_first_warp) {
      // The other warps go straight to their examples: these sums are off their path.
      value_t of_lr = -warp_dot(lanes, adjoint, g);
      if (decays) {
        of_lr -= task.weight_decay * (warp_dot(lanes, adjoint, c) + shares[k] * start_adjoint);
        start_adjoint *= task.decay(k);
      }
      if (threadIdx.x == 0) b.grad_lr[t * steps + k] = of_lr;
    }
    for_each(support, [&](int i) {
      if (!b.first_order) {
        curve(task, task.predictions + k * lanes, -task.lr[k], adjoint, y, i);
      }
      for (int n = 0; n < ways; ++n) {
        const int at = n * support + i;
        if (b.first_order) y[at] = 0;
        sum[at] += shares[k] * y[at];
      }
    });
    __syncthreads();
    // Y_k of all examples is complete only behind the barrier.
    if (is_first_warp && decays) start_adjoint += warp_dot(lanes, y, start);
    // Nothing reads the adjoint of C_0 = 0.
    if (k == 0) break;
    if (b.first_order) {
      for_each(lanes, [&](int i) { next[i] = task.decay(k) * adjoint[i]; });
    } else {
      value_t* path = paths == nullptr ? nullptr : paths + k * task.head();
      if (!task.o.dual) {
        // Q_k = Y_k' X is kept: the gradient of x reads it too.
        combine_examples(task, value_t(0), static_cast<const value_t*>(nullptr), value_t(1), y,
                         path);
        __syncthreads();
      }
      set_product(task, task.decay(k), adjoint, y, gram, path, next);
    }
    // The product reads all of R while it writes the next, so there are two.
    value_t* swapped = adjoint;
    adjoint = next;
    next = swapped;
  }

  combine_examples(task, shares[steps], upstream, value_t(1), sum, b.grad_weight + t * task.head());
  for_each(task.o.has_bias ? ways : 0, [&](int64_t n) {
    const value_t bias =
        shares[steps] * widen(upstream_bias[n]) + row_sum(sum + n * support, support);
    b.grad_bias[t * ways + n] = narrow<scalar_t>(bias);
  });
  for_each(b.grad_targets == nullptr ? 0 : lanes, [&](int at) {
    const int n = at / support, i = at % support;
    value_t of_targets = 0;
    for (int k = 0; k < steps; ++k) of_targets -= adjoints[k * lanes + at];
    b.grad_targets[(t * support + i) * ways + n] = narrow<scalar_t>(of_targets);
  });
  if (b.grad_x == nullptr) return;
  for_each(pairs == nullptr ? 0 : support * support, [&](int at) {
    const int i = at / support, j = at % support;
    value_t pair = 0;
    // Rows from step 1 on, as C_0 = 0.
    for (int r = ways; r < steps * ways; ++r) {
      const value_t *y = adjoints + r * support, *c = coefficients + r * support;
      pair += y[i] * c[j] + c[i] * y[j];
    }
    pairs[at] = pair;
  });
  __syncthreads();
  write_grad_x(task, sum, coefficients, adjoints, pairs, paths, upstream,
               b.grad_x + t * support * s.features);
}

template <typename scalar_t>
Tasks<scalar_t> tasks_of(const LinearHeadOperands& o) {
  using value_t = acc_t<scalar_t>;
  const Task<scalar_t> first{
      o.shape,
      o.options,
      static_cast<value_t>(residual_factor(o.options.loss, o.shape, o.shape.support)),
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

// Chooses the memory of a block's arrays: shared bytes, or a part of the workspace for each task.
template <typename value_t>
struct Place {
  size_t shared_bytes;
  value_t* global;

  Place(int64_t size, int64_t tasks, Workspace& space) {
    // The same arrays in global memory are slower but correct for any size.
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
