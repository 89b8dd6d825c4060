// Parts of the kernels of linear_head.cu: the operands of a task, the arrays of its block, and the
// products and losses of the recursion in linear_head.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "common/absent.h"
#include "common/cuda/block_products.cuh"
#include "common/cuda/launch.cuh"
#include "common/cuda/reduce.cuh"
#include "linear_head/linear_head.h"

namespace fastmeta::block_head {

inline constexpr int kRows = 8;  // of a tile of coefficients by features

// Operands of one task, names as in linear_head.h.
template <typename scalar_t>
struct Task {
  using value_t = acc_t<scalar_t>;
  LinearHeadShape s;
  LinearHeadOptions o;
  value_t factor, weight_decay;  // factor of the task's present examples
  const scalar_t *x, *weight, *bias, *targets;
  const int64_t* labels;
  const value_t* lr;
  value_t *predictions, *products;

  __device__ int64_t lanes() const { return s.ways * s.support; }
  __device__ int64_t head() const { return s.ways * s.features; }
  __device__ value_t decay(int64_t k) const { return 1 - lr[k] * weight_decay; }
  __device__ value_t* path(int64_t k) const { return products + (k - 1) * head(); }
  __device__ bool is_absent(int64_t i) const { return labels != nullptr && labels[i] == kAbsent; }
  __device__ value_t factor_of(int64_t i) const { return is_absent(i) ? 0 : factor; }
  // Target y[n, i]; 0 for an absent example, NaN for a label out of range.
  __device__ value_t wanted(int64_t n, int64_t i) const {
    if (o.loss == HeadLoss::kMse) return widen(targets[i * s.ways + n]);
    const int64_t label = labels[i];
    if (label == kAbsent) return 0;
    const int64_t classes = o.loss == HeadLoss::kLogistic ? 2 : s.ways;
    // A kernel cannot raise: NaN spreads to the whole head of the task, where it is seen.
    if (label < 0 || label >= classes) return std::numeric_limits<value_t>::quiet_NaN();
    return o.loss == HeadLoss::kLogistic ? value_t(label) : value_t(label == n ? 1 : 0);
  }
};

// Counts the present ones of the examples, by a whole warp.
__device__ inline int64_t count_present(const int64_t* labels, int64_t examples) {
  int64_t count = 0;
  for (int64_t first = 0; first < examples; first += kWarp) {
    const int64_t i = first + threadIdx.x % kWarp;
    count += __popc(__ballot_sync(kAllLanes, i < examples && labels[i] != kAbsent));
  }
  return count;
}

// Operands of all tasks.
template <typename scalar_t>
struct Tasks {
  Task<scalar_t> first;
  int64_t weight_stride;

  // For whole warps.
  __device__ Task<scalar_t> operator[](int64_t t) const {
    Task<scalar_t> task = first;
    const auto& s = first.s;
    task.x += t * s.support * s.features;
    task.weight += t * weight_stride;
    if (task.bias != nullptr) task.bias += t * s.ways;
    if (task.targets != nullptr) task.targets += t * s.support * s.ways;
    if (task.labels != nullptr) {
      task.labels += t * s.support;
      const int64_t present = count_present(task.labels, s.support);
      if (present < s.support) task.factor = present == 0 ? 0 : acc_t<scalar_t>(1) / present;
    }
    task.lr += t * s.steps;
    task.predictions += t * s.steps * s.ways * s.support;
    task.products += t * (first.o.dual ? s.support * s.support : s.steps * s.ways * s.features);
    return task;
  }
};

// Arrays of a block, in shared memory, or in global memory if they do not fit.
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

template <typename value_t>
__device__ value_t row_sum(const value_t* row, int64_t count) {
  value_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += row[i];
  return sum;
}

// Computes (X head' + bias)' [N, S], for heads of any type; bias may be null.
template <typename scalar_t>
__device__ void outputs_of(const Task<scalar_t>& task, const scalar_t* weight, const scalar_t* bias,
                           acc_t<scalar_t>* out) {
  const auto& s = task.s;
  block_row_dots(s.ways, s.support, s.features, weight, task.x, [&](int64_t n, int64_t i, auto z) {
    out[n * s.support + i] = bias == nullptr ? z : z + widen(bias[n]);
  });
}

// Computes out = share base + ((X X' + 1) c)' [N, S], c [N, S]; no thread may still read out. In
// the dual gram is X X' + 1, in the primal path is c X.
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
    // The 1 in X X' + 1, which the path c X lacks.
    const auto of_bias = task.o.has_bias ? row_sum(c + n * s.support, s.support) : 0;
    out[at] = share * base[at] + z + of_bias;
  });
}

// Computes out [N, D] = share base + factor c X, c [N, S]; base may be null.
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

// Replaces outputs z [N, S] by predictions, 0 for an absent example; for the owner of example i.
template <typename scalar_t>
__device__ void predict(const Task<scalar_t>& task, acc_t<scalar_t>* z, int64_t i) {
  using value_t = acc_t<scalar_t>;
  const int64_t step = task.s.support;
  if (task.is_absent(i)) {
    // Its outputs may overflow, and the softmax of such outputs is NaN.
    for (int64_t n = 0; n < task.s.ways; ++n) z[n * step + i] = 0;
    return;
  }
  // The logistic loss has one output, row 0.
  if (task.o.loss == HeadLoss::kLogistic) z[i] = 1 / (1 + std::exp(-z[i]));
  if (task.o.loss != HeadLoss::kCrossEntropy) return;
  // Subtracting the largest logit keeps exp from overflowing.
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

// Computes out = J v from predictions p; for the owner of example i.
template <typename scalar_t>
__device__ void curve(const Task<scalar_t>& task, const acc_t<scalar_t>* p, acc_t<scalar_t> scale,
                      const acc_t<scalar_t>* v, acc_t<scalar_t>* out, int64_t i) {
  using value_t = acc_t<scalar_t>;
  const int64_t step = task.s.support;
  const value_t factor = task.factor_of(i);
  // The softmax' derivative: J v = p (v - p.v).
  value_t mean = 0;
  for (int64_t n = 0; task.o.loss == HeadLoss::kCrossEntropy && n < task.s.ways; ++n) {
    mean += p[n * step + i] * v[n * step + i];
  }
  for (int64_t n = 0; n < task.s.ways; ++n) {
    const int64_t at = n * step + i;
    value_t along = v[at];
    if (task.o.loss == HeadLoss::kCrossEntropy) along = p[at] * (v[at] - mean);
    if (task.o.loss == HeadLoss::kLogistic) along = p[at] * (1 - p[at]) * v[at];
    out[at] = factor * scale * along;
  }
}

template <typename value_t>
FASTMETA_HOST_DEVICE int64_t forward_scratch(const LinearHeadShape& s, bool dual) {
  return 3 * s.ways * s.support + (dual ? s.support * s.support : 0);
}

}  // namespace fastmeta::block_head
