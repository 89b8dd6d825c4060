// Gradient of any function of pairwise distances: the weighted sums of pairwise_distance.h, as
// matrix products over blocks of W, which never exists as a whole.
//
// Blocks of kRows rows of x are taken a few at a time, at least one a thread. First each thread
// fills its own blocks of W and finishes grad_x for them. Then each adds all of these blocks to its
// own columns of grad_y. Every sum has one owner and one order, for any number of threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/cpu/denormals.h"
#include "common/cpu/gemm.h"
#include "common/cpu/parallel.h"
#include "common/cpu/transpose.h"
#include "pairwise_distance/tile_cpu.h"

namespace fastmeta {

template <typename value_t>
value_t sum_of(const value_t* x, int64_t n) {
  using Vec = at::vec::Vectorized<value_t>;
  return at::vec::reduce_all<value_t>([](Vec a, Vec b) { return a + b; }, x, n);
}

template <typename value_t>
value_t dot_product(const value_t* x, const value_t* y, int64_t n) {
  using Vec = at::vec::Vectorized<value_t>;
  return at::vec::map2_reduce_all<value_t>([](Vec a, Vec b) { return a * b; },
                                           [](Vec a, Vec b) { return a + b; }, x, y, n);
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
  static constexpr int64_t kRows = 128;   // rows of x in a block: the reuse of y from memory
  static constexpr int64_t kPanel = 64;   // columns of a product: four AVX-512 vectors
  static constexpr int64_t kDepth = 512;  // depth of a product: kDepth x kPanel stays in L2

 public:
  PairwiseGradient(Metric metric, const PairwiseShape& shape)
      : metric_(metric),
        shape_(shape),
        blocks_at_once_(
            std::min(blocks(shape.queries, kRows), std::max<int64_t>(4, thread_count()))),
        center_(shape.features),
        inverse_norm_(shape.classes),
        y_(blocks(shape.features, kPanel) * kPanel * shape.classes),
        weights_(blocks_at_once_ * kRows * shape.classes),
        xt_(blocks_at_once_ * kRows * shape.features),
        grad_yt_(shape.features * shape.classes),
        column_sums_(shape.classes) {}

  // Runs one task. weigh(first, rows, x, weights) fills rows [first, first + rows) of W,
  // `shape.classes` wide, given these rows of x, prepared for distance_rows.
  template <typename Weigh>
  void run(const scalar_t* x, const scalar_t* y, const Weigh& weigh, scalar_t* grad_x,
           scalar_t* grad_y) {
    prepare_y(y);
    std::fill_n(grad_yt_.data(), shape_.features * shape_.classes, value_t(0));
    std::fill_n(column_sums_.data(), shape_.classes, value_t(0));
    const int64_t step = blocks_at_once_ * kRows;
    for (int64_t first = 0; first < shape_.queries; first += step) {
      const int64_t rows = std::min(step, shape_.queries - first);
      for_each_block(rows, kRows, [&](int64_t begin, int64_t count) {
        rows_of_x(x, weigh, first, begin, count, grad_x);
      });
      for_each_block(shape_.classes, kPanel,
                     [&](int64_t begin, int64_t count) { columns_of_y(rows, begin, count); });
    }
    for_each_block(shape_.classes, kPanel,
                   [&](int64_t begin, int64_t count) { finish_rows_of_y(begin, count, grad_y); });
  }

 private:
  static int64_t blocks(int64_t n, int64_t size) { return (n + size - 1) / size; }

  // Calls body(first, count) for blocks of `size` of n things, in parallel, denormals flushed.
  template <typename Body>
  static void for_each_block(int64_t n, int64_t size, const Body& body) {
    parallel_for(0, blocks(n, size), 1, [&](int64_t begin, int64_t end) {
      const FlushDenormals flush;
      for (int64_t b = begin; b < end; ++b) body(b * size, std::min(size, n - b * size));
    });
  }

  // Address of entry d of prepared row j of y. Columns are in panels, so that products read
  // consecutive memory.
  value_t* y_panel(int64_t d, int64_t j) {
    return &y_[d / kPanel * kPanel * shape_.classes + j * kPanel];
  }

  // Prepares rows for the weighted sums: normalised for cosine, unchanged for dot. For differences
  // they are moved to the mean of y, as the sums would otherwise lose digits to a common offset.
  void prepare_y(const scalar_t* y) {
    find_center(y);
    for_each_block(shape_.classes, kPanel, [&](int64_t begin, int64_t count) {
      Buffer<value_t> row(shape_.features);
      for (int64_t j = begin; j < begin + count; ++j) {
        inverse_norm_[j] =
            prepare_row(metric_, y + j * shape_.features, row.data(), shape_.features);
        subtract_center(row.data(), 1, row.data());
        for (int64_t d = 0; d < shape_.features; d += kPanel) {
          std::copy_n(&row[d], std::min(kPanel, shape_.features - d), y_panel(d, j));
        }
      }
    });
  }

  void find_center(const scalar_t* y) {
    std::fill_n(center_.data(), shape_.features, value_t(0));
    if (!is_difference(metric_)) return;
    for_each_block(shape_.features, kPanel, [&](int64_t begin, int64_t count) {
      double sum[kPanel] = {};
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

  template <typename Weigh>
  void rows_of_x(const scalar_t* x, const Weigh& weigh, int64_t first, int64_t begin, int64_t rows,
                 scalar_t* grad_x) {
    const int64_t features = shape_.features, row = first + begin;
    Buffer<value_t> a(rows * features), wide(is_reduced<scalar_t> ? rows * features : 0);
    Buffer<value_t> inverse_norms(rows);
    value_t* weights = &weights_[begin * shape_.classes];
    const value_t* prepared =
        prepare_rows(metric_, x + row * features, rows, features, a.data(), inverse_norms.data());
    weigh(row, rows, prepared, weights);
    subtract_center(prepared, rows, a.data());
    transpose(rows, features, a.data(), features, &xt_[begin * features], kRows);
    value_t* grad = widened_target(grad_x + row * features, wide.data());
    multiply_by_y(weights, rows, grad);
    for (int64_t r = 0; r < rows; ++r) {
      const value_t weight_sum = sum_of(weights + r * shape_.classes, shape_.classes);
      finish_gradient_row(metric_, grad + r * features, &a[r * features], weight_sum,
                          inverse_norms[r], features);
    }
    if constexpr (is_reduced<scalar_t>) narrow(grad, grad_x + row * features, rows * features);
  }

  // Computes grad [rows, features] = weights [rows, classes] y.
  void multiply_by_y(const value_t* weights, int64_t rows, value_t* grad) {
    for (int64_t j = 0; j < shape_.classes; j += kDepth) {
      for (int64_t d = 0; d < shape_.features; d += kPanel) {
        gemm<value_t>(rows, std::min(kPanel, shape_.features - d),
                      std::min(kDepth, shape_.classes - j), {weights + j, shape_.classes},
                      {y_panel(d, j), kPanel}, grad + d, shape_.features, j > 0);
      }
    }
  }

  // Computes grad_y' [features, columns] += x' weights, over the blocks of rows at hand.
  void columns_of_y(int64_t rows, int64_t first, int64_t columns) {
    for (int64_t d = 0; d < shape_.features; d += kPanel) {
      for (int64_t begin = 0; begin < rows; begin += kRows) {
        gemm<value_t>(std::min(kPanel, shape_.features - d), columns, std::min(kRows, rows - begin),
                      {&xt_[begin * shape_.features + d * kRows], kRows},
                      {&weights_[begin * shape_.classes + first], shape_.classes},
                      &grad_yt_[d * shape_.classes + first], shape_.classes, true);
      }
    }
    for (int64_t i = 0; i < rows; ++i) {
      const value_t* row = &weights_[i * shape_.classes + first];
      for (int64_t j = 0; j < columns; ++j) column_sums_[first + j] += row[j];
    }
  }

  void finish_rows_of_y(int64_t first, int64_t rows, scalar_t* grad_y) {
    const int64_t features = shape_.features;
    Buffer<value_t> row(features), grads(rows * features);
    transpose(features, rows, &grad_yt_[first], shape_.classes, grads.data(), features);
    for (int64_t j = first; j < first + rows; ++j) {
      for (int64_t d = 0; d < features; d += kPanel) {
        std::copy_n(y_panel(d, j), std::min(kPanel, features - d), &row[d]);
      }
      value_t* grad = &grads[(j - first) * features];
      finish_gradient_row(metric_, grad, row.data(), column_sums_[j], inverse_norm_[j], features);
      narrow(grad, grad_y + j * features, features);
    }
  }

  const Metric metric_;
  const PairwiseShape shape_;
  const int64_t blocks_at_once_;
  Buffer<value_t> center_, inverse_norm_, y_, weights_, xt_, grad_yt_, column_sums_;
};

}  // namespace fastmeta
