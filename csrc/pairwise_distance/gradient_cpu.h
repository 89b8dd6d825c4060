// Gradient of any function of pairwise distances: the weighted sums of pairwise_distance.h, as
// matrix products over blocks of W, which never exists as a whole.
//
// Blocks of kRows rows of x are taken a few at a time. First each thread fills its own blocks of W
// and finishes grad_x for them. Then each adds all of these blocks to its own rows of grad_y. Every
// sum has one owner and one order, for any number of threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/ceil_div.h"
#include "common/cpu/denormals.h"
#include "common/cpu/gemm.h"
#include "common/cpu/parallel.h"
#include "pairwise_distance/tile_cpu.h"

namespace fastmeta {

template <typename value_t>
value_t sum_of(const value_t* x, int64_t n) {
  using Vec = at::vec::Vectorized<value_t>;
  return at::vec::reduce_all<value_t>([](Vec a, Vec b) { return a + b; }, x, n);
}

// Turns sum_j W_ij y_j into the gradient of row `a`; formulas in pairwise_distance.h.
template <typename value_t>
void finish_gradient_row(Metric metric, value_t* grad, const value_t* a, value_t weight_sum,
                         value_t inverse_norm, int64_t features) {
  if (metric == Metric::kDot) return;
  value_t along = weight_sum, factor = 1;
  if (metric == Metric::kCosine) {
    const bool clamped = inverse_norm >= value_t(1 / kCosineEps);
    along = clamped ? value_t(0) : dot_product(a, grad, features);
    factor = inverse_norm;
  }
  for (int64_t d = 0; d < features; ++d) grad[d] = factor * (grad[d] - along * a[d]);
}

// Workspace for tasks of one shape; run() does one task.
template <typename scalar_t>
class PairwiseGradient {
  using value_t = acc_t<scalar_t>;
  static constexpr int64_t kRows = 128;        // rows of x in a block: the reuse of y from memory
  static constexpr int64_t kBlocksAtOnce = 4;  // the reuse of grad_y
  static constexpr int64_t kClasses = 256;     // rows of y in a block

 public:
  PairwiseGradient(Metric metric, const PairwiseShape& shape)
      : metric_(metric),
        shape_(shape),
        rows_at_once_(std::min(shape.queries, kRows * std::max(kBlocksAtOnce, thread_count()))),
        center_(shape.features),
        inverse_norm_(shape.classes),
        y_(shape.classes * shape.features),
        weights_(rows_at_once_ * shape.classes + kPastRow),
        x_(rows_at_once_ * shape.features),
        grad_y_(is_reduced<scalar_t> ? shape.classes * shape.features : 0),
        column_sums_(shape.classes) {}

  // Runs one task. weigh(first, rows, x, weights) fills rows [first, first + rows) of W,
  // `shape.classes` wide, given these rows of x, prepared for distance_rows. It may read kPastRow
  // numbers more.
  template <typename Weigh>
  void run(const scalar_t* x, const scalar_t* y, const Weigh& weigh, scalar_t* grad_x,
           scalar_t* grad_y) {
    prepare_y(y);
    value_t* sums = widened_target(grad_y, grad_y_.data());
    std::fill_n(column_sums_.data(), shape_.classes, value_t(0));
    for (int64_t first = 0; first < shape_.queries; first += rows_at_once_) {
      const int64_t rows = std::min(rows_at_once_, shape_.queries - first);
      for_each_block(rows, kRows, [&](int64_t begin, int64_t count) {
        rows_of_x(x, weigh, first, begin, count, grad_x);
      });
      for_each_block(shape_.classes, kClasses, [&](int64_t begin, int64_t count) {
        add_to_y(rows, begin, count, sums, first > 0);
      });
    }
    for_each_block(shape_.classes, kClasses, [&](int64_t begin, int64_t count) {
      for (int64_t j = begin; j < begin + count; ++j) {
        finish_gradient_row(metric_, sums + j * shape_.features, &y_[j * shape_.features],
                            column_sums_[j], inverse_norm_[j], shape_.features);
      }
      const int64_t at = begin * shape_.features;
      if constexpr (is_reduced<scalar_t>) narrow(sums + at, grad_y + at, count * shape_.features);
    });
  }

 private:
  // Calls body(first, count) for blocks of `size` of n things, in parallel, denormals flushed.
  template <typename Body>
  static void for_each_block(int64_t n, int64_t size, const Body& body) {
    parallel_for(0, ceil_div(n, size), 1, [&](int64_t begin, int64_t end) {
      const FlushDenormals flush;
      for (int64_t b = begin; b < end; ++b) body(b * size, std::min(size, n - b * size));
    });
  }

  // Prepares rows for the weighted sums: normalised for cosine, unchanged for dot. For differences
  // they are moved to the mean of y, as the sums would otherwise lose digits to a common offset.
  void prepare_y(const scalar_t* y) {
    find_center(y);
    for_each_block(shape_.classes, kClasses, [&](int64_t begin, int64_t count) {
      for (int64_t j = begin; j < begin + count; ++j) {
        value_t* row = &y_[j * shape_.features];
        inverse_norm_[j] = prepare_row(metric_, y + j * shape_.features, row, shape_.features);
        subtract_center(row, 1, row);
      }
    });
  }

  void find_center(const scalar_t* y) {
    std::fill_n(center_.data(), shape_.features, value_t(0));
    if (!is_difference(metric_)) return;
    constexpr int64_t kFeatures = 64;
    for_each_block(shape_.features, kFeatures, [&](int64_t begin, int64_t count) {
      double sum[kFeatures] = {};
      for (int64_t j = 0; j < shape_.classes; ++j) {
        const scalar_t* row = y + j * shape_.features + begin;
        for (int64_t d = 0; d < count; ++d) sum[d] += static_cast<value_t>(row[d]);
      }
      for (int64_t d = 0; d < count; ++d) {
        center_[begin + d] = static_cast<value_t>(sum[d] / static_cast<double>(shape_.classes));
      }
    });
  }

  // Computes out = rows - center (rows themselves if products are summed); out may be rows.
  void subtract_center(const value_t* rows, int64_t count, value_t* out) const {
    if (!is_difference(metric_)) {
      if (rows != out) std::copy_n(rows, count * shape_.features, out);
      return;
    }
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t d = 0; d < shape_.features; ++d) {
        out[r * shape_.features + d] = rows[r * shape_.features + d] - center_[d];
      }
    }
  }

  // Fills W and grad_x for `rows` rows from begin of those at hand, which begin at `first`.
  template <typename Weigh>
  void rows_of_x(const scalar_t* x, const Weigh& weigh, int64_t first, int64_t begin, int64_t rows,
                 scalar_t* grad_x) {
    const int64_t features = shape_.features, row = first + begin;
    Buffer<value_t> wide(is_reduced<scalar_t> ? rows * features : 0), inverse_norms(rows);
    value_t* a = &x_[begin * features];
    value_t* weights = &weights_[begin * shape_.classes];
    const value_t* prepared =
        prepare_rows(metric_, x + row * features, rows, features, a, inverse_norms.data());
    weigh(row, rows, prepared, weights);
    subtract_center(prepared, rows, a);
    value_t* grad = widened_target(grad_x + row * features, wide.data());
    gemm<value_t>(rows, features, shape_.classes, {weights, shape_.classes}, {y_.data(), features},
                  grad, features, false);
    for (int64_t r = 0; r < rows; ++r) {
      const value_t weight_sum = sum_of(weights + r * shape_.classes, shape_.classes);
      finish_gradient_row(metric_, grad + r * features, a + r * features, weight_sum,
                          inverse_norms[r], features);
    }
    if constexpr (is_reduced<scalar_t>) narrow(grad, grad_x + row * features, rows * features);
  }

  // Computes sums [classes, features] += weights' x, over the rows at hand.
  void add_to_y(int64_t rows, int64_t first, int64_t classes, value_t* sums, bool adds) {
    constexpr int64_t kDepth = kBlocksAtOnce * kRows;
    for (int64_t i = 0; i < rows; i += kDepth) {
      gemm<value_t>(classes, shape_.features, std::min(kDepth, rows - i),
                    {&weights_[i * shape_.classes + first], shape_.classes, true},
                    {&x_[i * shape_.features], shape_.features}, sums + first * shape_.features,
                    shape_.features, adds || i > 0);
    }
    for (int64_t i = 0; i < rows; ++i) {
      const value_t* row = &weights_[i * shape_.classes + first];
      for (int64_t j = 0; j < classes; ++j) column_sums_[first + j] += row[j];
    }
  }

  const Metric metric_;
  const PairwiseShape shape_;
  const int64_t rows_at_once_;
  Buffer<value_t> center_, inverse_norm_, y_, weights_, x_, grad_y_, column_sums_;
};

}  // namespace fastmeta
