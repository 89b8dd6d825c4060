// CPU implementation of ridge regression. A thread takes tasks, one at a time.
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <atomic>
#include <cmath>

#include "common/cpu/parallel.h"
#include "common/cpu/register_gemm.h"
#include "common/cpu/row_sums.h"
#include "common/cpu/transpose.h"
#include "common/cpu/widen.h"
#include "ridge_head/cholesky_cpu.h"
#include "ridge_head/ridge_head_ops.h"

namespace fastmeta {
namespace {

template <typename value_t>
void add_scaled(value_t* target, const value_t* row, value_t factor, int64_t n) {
  for (int64_t i = 0; i < n; ++i) target[i] += factor * row[i];
}

template <typename value_t>
value_t dot(const value_t* a, const value_t* b, int64_t n) {
  value_t sum;
  RowSums<value_t, ProductOfVectors>::run(1, 1, n, a, b, &sum, 1);
  return sum;
}

// Examples of the task at hand: rows of X and Y, as in ridge_head.h, and what made them.
template <typename value_t>
struct Examples {
  const RidgeShape& s;
  Buffer<value_t> roots, mean_x, mean_y, x, y;
  value_t total = 0;

  explicit Examples(const RidgeShape& shape)
      : s(shape),
        roots(s.examples),
        mean_x(s.features),
        mean_y(s.ways),
        x(s.examples * s.features),
        y(s.examples * s.ways) {}

  void prepare(const value_t* of_x, const value_t* of_y, const value_t* weight) {
    total = 0;
    for (int64_t i = 0; i < s.examples; ++i) {
      total += weight[i];
      roots[i] = std::sqrt(weight[i]);
    }
    prepare_rows(of_x, weight, s.features, mean_x.data(), x.data());
    prepare_rows(of_y, weight, s.ways, mean_y.data(), y.data());
  }

 private:
  void prepare_rows(const value_t* rows, const value_t* weight, int64_t width, value_t* mean,
                    value_t* out) const {
    std::fill_n(mean, width, value_t(0));
    if (s.bias && total > 0) {
      for (int64_t i = 0; i < s.examples; ++i) {
        // An absent example adds nothing, whatever it holds.
        if (weight[i] != 0) add_scaled(mean, rows + i * width, weight[i] / total, width);
      }
    }
    for (int64_t i = 0; i < s.examples; ++i) {
      const value_t *row = rows + i * width, root = roots[i];
      value_t* target = out + i * width;
      if (root == 0) {
        std::fill_n(target, width, value_t(0));
        continue;
      }
      for (int64_t j = 0; j < width; ++j) target[j] = root * (row[j] - mean[j]);
    }
  }
};

// Operands of one task.
template <typename value_t>
struct Task {
  const value_t *x, *y, *weight;
  value_t l2;
  value_t *head, *intercept, *factor, *coefficients;

  Task(const RidgeShape& s, const RidgeOperands& o, int64_t t)
      : x(at(o.x, t * s.examples * s.features)),
        y(at(o.y, t * s.examples * s.ways)),
        weight(at(o.weight, t * s.examples)),
        l2(*at(o.l2, t)),
        head(at(o.head, t * s.ways * s.features)),
        intercept(at(o.intercept, s.bias ? t * s.ways : 0)),
        factor(at(o.factor, t * s.unknowns() * s.unknowns())),
        coefficients(at(o.coefficients, s.dual ? t * s.ways * s.examples : 0)) {}

  static const value_t* at(const void* array, int64_t place) {
    return static_cast<const value_t*>(array) + place;
  }
  static value_t* at(void* array, int64_t place) { return static_cast<value_t*>(array) + place; }
};

// Work arrays of the fit of one task.
template <typename value_t>
class Fit {
 public:
  explicit Fit(const RidgeShape& shape)
      : s(shape),
        stride_(padded<value_t>(s.unknowns())),
        examples_(shape),
        system_(s.unknowns() * stride_),
        columns_(s.unknowns() * padded<value_t>(s.ways)),
        transposed_(uses_transposed() ? s.features * stride_ : 0) {}

  // Writes the head of a task, and returns whether it has one.
  bool run(const Task<value_t>& task) {
    examples_.prepare(task.x, task.y, task.weight);
    const value_t *x = examples_.x.data(), *y = examples_.y.data();
    const int64_t n = s.unknowns();
    s.dual ? multiply_rows(x) : multiply_columns(x);
    for (int64_t i = 0; i < n; ++i) system_[i * stride_ + i] += task.l2;
    if (s.dual && task.l2 == 0) make_regular(task.weight);
    if (!factorise(system_.data(), n, task.factor)) return false;
    if (s.dual) {
      transpose(s.examples, s.ways, y, s.ways, task.coefficients, s.examples);
      solve_rows(task.factor, n, s.ways, task.coefficients, columns_.data());
      multiply<value_t>(s.ways, s.features, s.examples, {task.coefficients, s.examples}, x,
                        task.head, false);
    } else {
      multiply<value_t>(s.ways, s.features, s.examples, {y, s.ways, true}, x, task.head, false);
      solve_rows(task.factor, n, s.ways, task.head, columns_.data());
    }
    for (int64_t w = 0; s.bias && w < s.ways; ++w) {
      const value_t moved = dot(task.head + w * s.features, examples_.mean_x.data(), s.features);
      task.intercept[w] = examples_.mean_y[w] - moved;
    }
    return true;
  }

 private:
  // Whether X X' is made of X and X'. Sums of long rows need no X'.
  bool uses_transposed() const { return s.dual && s.features <= 256; }

  // system = X X'
  void multiply_rows(const value_t* x) {
    const int64_t n = s.examples;
    if (!uses_transposed()) {
      std::fill_n(system_.data(), n * stride_, value_t(0));
      return row_dots(n, n, s.features, x, x, system_.data(), stride_);
    }
    for (int64_t d = 0; d < s.features; ++d) {
      std::fill_n(&transposed_[d * stride_ + n], stride_ - n, value_t(0));
    }
    transpose(n, s.features, x, s.features, transposed_.data(), stride_);
    multiply<value_t>(n, stride_, s.features, {x, s.features}, transposed_.data(), system_.data(),
                      false);
  }

  // system = X' X
  void multiply_columns(const value_t* x) {
    const int64_t n = s.features;
    if (n == stride_) {
      return multiply<value_t>(n, n, s.examples, {x, n, true}, x, system_.data(), false);
    }
    std::fill_n(system_.data(), n * stride_, value_t(0));
    gemm<value_t>(n, n, s.examples, {x, n, true}, {x, n}, system_.data(), stride_, false);
  }

  // Adds to X X' in its null space, where Y has no part, see ridge_head.h.
  void make_regular(const value_t* weight) {
    const int64_t n = s.examples;
    for (int64_t i = 0; i < n; ++i) {
      if (weight[i] == 0) system_[i * stride_ + i] = 1;
    }
    if (!s.bias || !(examples_.total > 0)) return;
    value_t mean = 0;
    for (int64_t i = 0; i < n; ++i) mean += system_[i * stride_ + i] / n;
    for (int64_t i = 0; i < n; ++i) {
      add_scaled(&system_[i * stride_], examples_.roots.data(),
                 mean * examples_.roots[i] / examples_.total, n);
    }
  }

  const RidgeShape& s;
  const int64_t stride_;  // between rows of the system
  Examples<value_t> examples_;
  Buffer<value_t> system_, columns_, transposed_;
};

// Work arrays of the gradient of one task.
template <typename value_t>
class Gradient {
 public:
  explicit Gradient(const RidgeShape& shape)
      : s(shape),
        examples_(shape),
        heads_(2 * s.ways * s.features),
        solved_(s.ways * s.examples),
        columns_(s.unknowns() * padded<value_t>(s.ways)),
        shares_(2 * s.ways * s.examples),
        predicted_(s.dual ? 0 : s.ways * s.examples),
        inverse_roots_(s.examples),
        row_(s.features) {}

  void run(const Task<value_t>& task, const value_t* upstream, const value_t* upstream_intercept,
           value_t* grad_x, value_t* grad_y, value_t* grad_weight, value_t* grad_l2) {
    examples_.prepare(task.x, task.y, task.weight);
    const int64_t head = s.ways * s.features;
    value_t *v = heads_.data(), *w = v + head;
    std::copy_n(upstream, head, v);
    std::copy_n(task.head, head, w);
    for (int64_t n = 0; s.bias && n < s.ways; ++n) {
      add_scaled(v + n * s.features, examples_.mean_x.data(), -upstream_intercept[n], s.features);
    }
    *grad_l2 = s.dual ? solve_dual(task, v) : solve_primal(task, v);
    const value_t* g = s.bias && examples_.total > 0 ? upstream_intercept : nullptr;
    find_shares(task, g, grad_weight);
    for (int64_t i = 0; i < s.examples; ++i) {
      for (int64_t n = 0; n < s.ways; ++n) {
        grad_y[i * s.ways + n] = -shares_[(s.ways + n) * s.examples + i];
      }
      if (task.weight[i] == 0) grad_weight[i] = absent_weight(task, i, g);
    }
    multiply<value_t>(s.examples, s.features, 2 * s.ways, {shares_.data(), s.examples, true}, v,
                      grad_x, false);
  }

 private:
  // Turns P into l2 V, and fills solved_ with U_d' [N, S]. Returns the gradient of l2.
  value_t solve_dual(const Task<value_t>& task, value_t* p) {
    const value_t* x = examples_.x.data();
    const int64_t count = s.ways * s.examples;
    row_dots(s.ways, s.examples, s.features, p, x, solved_.data(), s.examples);
    solve_rows(task.factor, s.examples, s.ways, solved_.data(), columns_.data());
    value_t* negative = shares_.data();
    for (int64_t i = 0; i < count; ++i) negative[i] = -solved_[i];
    multiply<value_t>(s.ways, s.features, s.examples, {negative, s.examples}, x, p, true);
    return -dot(solved_.data(), task.coefficients, count);
  }

  // Turns P into V, and fills solved_ with V X' and predicted_ with W X' [N, S]. Returns the
  // gradient of l2.
  value_t solve_primal(const Task<value_t>& task, value_t* p) {
    const value_t* x = examples_.x.data();
    solve_rows(task.factor, s.features, s.ways, p, columns_.data());
    row_dots(s.ways, s.examples, s.features, p, x, solved_.data(), s.examples);
    row_dots(s.ways, s.examples, s.features, task.head, x, predicted_.data(), s.examples);
    return -dot(p, task.head, s.ways * s.features);
  }

  // Fills shares_ with the factors of rows of V and of W in grad_x, [2 N, S], the latter -grad_y,
  // and writes grad_weight of the examples that X holds. g: the upstream of the intercept, or null.
  void find_shares(const Task<value_t>& task, const value_t* g, value_t* grad_weight) {
    const int64_t examples = s.examples;
    const value_t *root = examples_.roots.data(), *weight = task.weight;
    for (int64_t i = 0; i < examples; ++i) {
      inverse_roots_[i] = root[i] == 0 ? value_t(0) : 1 / root[i];
    }
    const value_t* inverse = inverse_roots_.data();
    std::fill_n(grad_weight, examples, value_t(0));
    for (int64_t n = 0; n < s.ways; ++n) {
      const value_t to_mean = g == nullptr ? value_t(0) : g[n] / examples_.total;
      const value_t* solved = &solved_[n * examples];
      value_t *of_v = &shares_[n * examples], *of_w = &shares_[(s.ways + n) * examples];
      residuals(task, n, of_v);
      for (int64_t i = 0; i < examples; ++i) {
        const value_t z = solved[i] * inverse[i] + to_mean;
        grad_weight[i] += of_v[i] * inverse[i] * z;
        of_v[i] *= root[i];
        of_w[i] = -weight[i] * z;
      }
      if (!s.dual) continue;
      // grad_x takes l2 V.
      const value_t* c = task.coefficients + n * examples;
      for (int64_t i = 0; i < examples; ++i) of_v[i] = root[i] * c[i];
    }
  }

  // Writes sqrt(w) r of output n [S].
  void residuals(const Task<value_t>& task, int64_t n, value_t* out) const {
    for (int64_t i = 0; i < s.examples; ++i) {
      const int64_t at = n * s.examples + i;
      out[i] =
          s.dual ? task.l2 * task.coefficients[at] : examples_.y[i * s.ways + n] - predicted_[at];
    }
  }

  // Returns <r, z> of an example of weight 0, which X and Y do not hold.
  value_t absent_weight(const Task<value_t>& task, int64_t i, const value_t* g) {
    const value_t *x = task.x + i * s.features, *y = task.y + i * s.ways;
    for (int64_t d = 0; d < s.features; ++d) row_[d] = x[d] - examples_.mean_x[d];
    value_t grad_weight = 0;
    for (int64_t n = 0; n < s.ways; ++n) {
      const value_t *v = &heads_[n * s.features], *head = task.head + n * s.features;
      const value_t residual = y[n] - examples_.mean_y[n] - dot(row_.data(), head, s.features);
      const value_t along = dot(row_.data(), v, s.features) / (s.dual ? task.l2 : value_t(1));
      grad_weight += residual * (along + (g == nullptr ? value_t(0) : g[n] / examples_.total));
    }
    return grad_weight;
  }

  const RidgeShape& s;
  Examples<value_t> examples_;
  Buffer<value_t> heads_;  // rows of V, or of l2 V, and of W
  Buffer<value_t> solved_, columns_, shares_, predicted_, inverse_roots_, row_;
};

// Calls body(value_t()) for the element type.
template <typename Body>
void with_wide(Dtype dtype, const Body& body) {
  dtype == Dtype::kFloat ? body(float()) : body(double());
}

struct OnCpu {
  static void forward(Dtype dtype, const RidgeShape& s, const RidgeOperands& operands,
                      const at::Tensor&) {
    std::atomic<int64_t> singular = s.tasks;  // the first such task
    with_wide(dtype, [&](auto zero) {
      using value_t = decltype(zero);
      parallel_for(0, s.tasks, grain(s), [&](int64_t begin, int64_t end) {
        Fit<value_t> fit(s);
        for (int64_t t = begin; t < end; ++t) {
          if (fit.run(Task<value_t>(s, operands, t))) continue;
          int64_t first = singular;
          while (t < first && !singular.compare_exchange_weak(first, t)) {
          }
        }
      });
    });
    if (singular == s.tasks) return;
    with_wide(dtype, [&](auto zero) {
      const auto l2 = static_cast<const decltype(zero)*>(operands.l2)[singular];
      TORCH_CHECK_VALUE(false, "l2: expected a larger number, as the examples of task ",
                        singular.load(), " are equal or dependent and its system is singular, got ",
                        l2);
    });
  }

  static void backward(Dtype dtype, const RidgeShape& s, const RidgeOperands& operands,
                       const RidgeGradients& gradients, const at::Tensor&) {
    with_wide(dtype, [&](auto zero) {
      using value_t = decltype(zero);
      using OfTask = Task<value_t>;
      parallel_for(0, s.tasks, grain(s), [&](int64_t begin, int64_t end) {
        Gradient<value_t> gradient(s);
        for (int64_t t = begin; t < end; ++t) {
          gradient.run(OfTask(s, operands, t),
                       OfTask::at(gradients.upstream_head, t * s.ways * s.features),
                       OfTask::at(gradients.upstream_intercept, s.bias ? t * s.ways : 0),
                       OfTask::at(gradients.x, t * s.examples * s.features),
                       OfTask::at(gradients.y, t * s.examples * s.ways),
                       OfTask::at(gradients.weight, t * s.examples), OfTask::at(gradients.l2, t));
        }
      });
    });
  }

  // Tasks that repay a thread.
  static int64_t grain(const RidgeShape& s) {
    const int64_t work = s.examples * s.features * (s.unknowns() + s.ways);
    return std::max<int64_t>(1, kGrain / std::max<int64_t>(work, 1));
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(fastmeta, CPU, m) { register_ridge_head<OnCpu>(m); }

}  // namespace fastmeta
