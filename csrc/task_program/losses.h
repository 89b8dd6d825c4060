// Losses of a task: the loss of each row of outputs z, its gradient dz, and the tangent of dz.
// `norm` is scale/examples (or scale/elements) for a mean over them, scale for a sum.
//
//   cross entropy (label smoothing e, N classes; p = softmax(z); q = (1 - e) e_y + e/N)
//                      -sum q log p     dz = norm (p - q)        dz_dot = norm p (z_dot - p.z_dot)
//   squared error      (z - y)^2        dz = 2 norm (z - y)      dz_dot = 2 norm z_dot
//   BCE with logits    log(1 + exp z) - y z     dz = norm (s - y), s = sigmoid z
//                                               dz_dot = norm s (1 - s) z_dot
//   Huber (delta)      z - y within delta: (z - y)^2/2, else delta (|z - y| - delta/2)
//   absolute error     |z - y|
// Rows with a negative label have no loss and no gradient: -1 marks an absent example, -2 here one
// with the label to ignore. Weights of examples multiply the loss and the gradient of their rows.
#pragma once

#include "common/absent.h"
#include "execution/executor.h"
#include "execution/math.h"
#include "task_program/program/program.h"

namespace fastmeta {

// What the label to ignore becomes; kAbsent marks an absent example.
inline constexpr int64_t kIgnoredLabel = -2;

// The factor of the loss of each of `counted` examples; 0 for a task without an example.
FASTMETA_HOST_DEVICE inline double norm_of_labels(double scale, bool mean, double counted,
                                                  bool all_absent) {
  if (!mean) return scale;
  return all_absent ? 0 : scale / counted;
}

template <typename storage_t>
struct LossArrays {
  int64_t columns;  // outputs of an example
  double weight;    // of this loss among others, multiplies the gradient
  Array<storage_t> z, targets, norm, row_loss, dz, z_dot, dz_dot;
};

// Softmax of a row: largest logit and sum of exp(logit - largest).
template <typename storage_t, typename ThreadGroup>
struct SoftmaxOfRow {
  using number_t = typename ThreadGroup::number_t;
  const ThreadGroup& group;
  Array<storage_t> z;
  number_t largest, inverse_sum, log_sum;

  FASTMETA_HOST_DEVICE SoftmaxOfRow(const ThreadGroup& t, Array<storage_t> row, int64_t columns)
      : group(t), z(row) {
    using M = Math<number_t>;
    largest = group.load(z, 0);
    for (int64_t n = group.lane; n < columns; n += group.size) {
      largest = M::larger(largest, group.load(z, n));
    }
    largest = group.larger(largest);
    number_t sum(0);
    for (int64_t n = group.lane; n < columns; n += group.size) {
      sum = sum + M::exp(group.load(z, n) - largest);
    }
    sum = group.sum(sum);
    inverse_sum = number_t(1) / sum;
    log_sum = M::log(sum);
  }
  FASTMETA_HOST_DEVICE number_t log_probability(int64_t n) const {
    return group.load(z, n) - largest - log_sum;
  }
  FASTMETA_HOST_DEVICE number_t probability(int64_t n) const {
    return Math<number_t>::exp(group.load(z, n) - largest) * inverse_sum;
  }
};

template <typename storage_t>
struct CrossEntropy {
  LossArrays<storage_t> l;
  double smoothing;

  template <typename ThreadGroup>
  FASTMETA_HOST_DEVICE void operator()(const ThreadGroup& group, int64_t row) const {
    using number_t = typename ThreadGroup::number_t;
    using M = Math<number_t>;
    const int64_t begin = row * l.columns;
    const SoftmaxOfRow<storage_t, ThreadGroup> softmax(group, l.z.from(begin), l.columns);
    const number_t zero(0), label = group.load(l.targets, row);
    const number_t norm = group.load(l.norm, 0) * number_t(l.weight);
    number_t loss(0);
    for (int64_t n = group.lane; n < l.columns; n += group.size) {
      const number_t target = M::if_equal(label, number_t(n), number_t(1 - smoothing), zero) +
                              number_t(smoothing / l.columns);
      loss = loss - M::if_equal(target, zero, zero, target * softmax.log_probability(n));
      if (!l.dz) continue;
      const number_t slope = norm * (softmax.probability(n) - target);
      group.store(l.dz, begin + n, M::if_less(label, zero, zero, slope));
    }
    loss = M::if_less(label, zero, zero, group.sum(loss));
    if (group.lane == 0) group.store(l.row_loss, row, loss);
  }
};

template <typename storage_t>
struct CrossEntropyTangent {
  LossArrays<storage_t> l;

  template <typename ThreadGroup>
  FASTMETA_HOST_DEVICE void operator()(const ThreadGroup& group, int64_t row) const {
    using number_t = typename ThreadGroup::number_t;
    using M = Math<number_t>;
    const int64_t begin = row * l.columns;
    const SoftmaxOfRow<storage_t, ThreadGroup> softmax(group, l.z.from(begin), l.columns);
    const number_t zero(0), label = group.load(l.targets, row);
    const number_t norm = group.load(l.norm, 0) * number_t(l.weight);
    number_t mean(0);
    for (int64_t n = group.lane; n < l.columns; n += group.size) {
      mean = mean + softmax.probability(n) * group.load(l.z_dot, begin + n);
    }
    mean = group.sum(mean);
    for (int64_t n = group.lane; n < l.columns; n += group.size) {
      const number_t change = group.load(l.z_dot, begin + n) - mean;
      const number_t slope = norm * softmax.probability(n) * change;
      group.store(l.dz_dot, begin + n, M::if_less(label, zero, zero, slope));
    }
  }
};

// Losses of a single output and its target. Each has the loss, its slope and its curvature in z.
struct SquaredError {
  template <typename number_t>
  FASTMETA_HOST_DEVICE number_t loss(const number_t& z, const number_t& y) const {
    return (z - y) * (z - y);
  }
  template <typename number_t>
  FASTMETA_HOST_DEVICE number_t slope(const number_t& z, const number_t& y) const {
    return number_t(2) * (z - y);
  }
  template <typename number_t>
  FASTMETA_HOST_DEVICE number_t curvature(const number_t&, const number_t&) const {
    return number_t(2);
  }
};

struct BceWithLogits {
  template <typename number_t>
  FASTMETA_HOST_DEVICE number_t loss(const number_t& z, const number_t& y) const {
    using M = Math<number_t>;  // softplus(z) = larger(z, 0) + log1p(exp(-|z|)) does not overflow
    const number_t zero(0);
    return M::larger(z, zero) + M::log1p(M::exp(zero - M::abs(z))) - y * z;
  }
  template <typename number_t>
  FASTMETA_HOST_DEVICE number_t slope(const number_t& z, const number_t& y) const {
    return Math<number_t>::sigmoid(z) - y;
  }
  template <typename number_t>
  FASTMETA_HOST_DEVICE number_t curvature(const number_t& z, const number_t&) const {
    const number_t s = Math<number_t>::sigmoid(z);
    return s * (number_t(1) - s);
  }
};

struct Huber {
  double delta;

  template <typename number_t>
  FASTMETA_HOST_DEVICE number_t loss(const number_t& z, const number_t& y) const {
    using M = Math<number_t>;
    const number_t e = M::abs(z - y), d(delta), half(0.5);
    return M::if_less(e, d, half * e * e, d * (e - half * d));
  }
  template <typename number_t>
  FASTMETA_HOST_DEVICE number_t slope(const number_t& z, const number_t& y) const {
    using M = Math<number_t>;
    const number_t e = z - y, d(delta), minus_d(-delta);
    return M::if_less(d, e, d, M::if_less(e, minus_d, minus_d, e));
  }
  template <typename number_t>
  FASTMETA_HOST_DEVICE number_t curvature(const number_t& z, const number_t& y) const {
    using M = Math<number_t>;
    return M::if_less(M::abs(z - y), number_t(delta), number_t(1), number_t(0));
  }
};

struct AbsoluteError {
  template <typename number_t>
  FASTMETA_HOST_DEVICE number_t loss(const number_t& z, const number_t& y) const {
    return Math<number_t>::abs(z - y);
  }
  template <typename number_t>
  FASTMETA_HOST_DEVICE number_t slope(const number_t& z, const number_t& y) const {
    using M = Math<number_t>;
    const number_t e = z - y, zero(0);
    return M::if_less(zero, e, number_t(1), M::if_less(e, zero, number_t(-1), e));  // NaN stays
  }
  template <typename number_t>
  FASTMETA_HOST_DEVICE number_t curvature(const number_t&, const number_t&) const {
    return number_t(0);
  }
};

template <typename Loss, typename storage_t>
struct RegressionLoss {
  Loss loss;
  LossArrays<storage_t> l;

  template <typename ThreadGroup>
  FASTMETA_HOST_DEVICE void operator()(const ThreadGroup& group, int64_t row) const {
    using number_t = typename ThreadGroup::number_t;
    const number_t norm = group.load(l.norm, 0) * number_t(l.weight);
    number_t sum(0);
    for (int64_t n = group.lane; n < l.columns; n += group.size) {
      const int64_t i = row * l.columns + n;
      const number_t z = group.load(l.z, i), y = group.load(l.targets, i);
      sum = sum + loss.loss(z, y);
      if (l.dz) group.store(l.dz, i, norm * loss.slope(z, y));
    }
    sum = group.sum(sum);
    if (group.lane == 0) group.store(l.row_loss, row, sum);
  }
};

template <typename Loss, typename storage_t>
struct RegressionTangent {
  Loss loss;
  LossArrays<storage_t> l;

  template <typename Accessor>
  FASTMETA_HOST_DEVICE void operator()(const Accessor& at) const {
    using number_t = typename Accessor::number_t;
    const number_t norm = at.load_one(l.norm, 0) * number_t(l.weight);
    at.store(l.dz_dot, norm * loss.curvature(at.load(l.z), at.load(l.targets)) * at.load(l.z_dot));
  }
};

// Multiplies rows of numbers, and the losses of the rows, by the weights of their examples; either
// may be missing. A weight of 0 leaves a row out, whatever its numbers are.
template <typename storage_t>
struct WeightRows {
  int64_t columns;
  Array<storage_t> weight, numbers, row_loss;

  template <typename ThreadGroup>
  FASTMETA_HOST_DEVICE void operator()(const ThreadGroup& group, int64_t row) const {
    using number_t = typename ThreadGroup::number_t;
    const number_t zero(0), own = group.load(weight, row);
    const auto scale = [&](const Array<storage_t>& a, int64_t i) {
      group.store(a, i, Math<number_t>::if_equal(own, zero, zero, own * group.load(a, i)));
    };
    if (numbers) {
      for (int64_t n = group.lane; n < columns; n += group.size) scale(numbers, row * columns + n);
    }
    if (row_loss && group.lane == 0) scale(row_loss, row);
  }
};

// Calls fn(loss) for the losses of a single output and its target.
template <typename Fn>
FASTMETA_HOST_DEVICE void with_regression_loss(const LossSpec& spec, const Fn& fn) {
  switch (spec.kind) {
    case LossKind::kMse:
      return fn(SquaredError{});
    case LossKind::kBceWithLogits:
      return fn(BceWithLogits{});
    case LossKind::kHuber:
      return fn(Huber{spec.a});
    case LossKind::kL1:
      return fn(AbsoluteError{});
    case LossKind::kCrossEntropy:
    case LossKind::kNone:
      return;
  }
}

}  // namespace fastmeta
