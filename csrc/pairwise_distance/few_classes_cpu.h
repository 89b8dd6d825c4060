// Gradient of any function of pairwise distances to few classes: the weighted sums of
// pairwise_distance.h, term by term, a lane of a vector a feature. Matrix products of few columns
// leave most lanes empty, and want their operands copied and moved to the mean.
//
// For a block of rows of x, threads first fill W by rows, then each takes features of both
// gradients. Every sum has one owner and one order, for any number of threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "common/ceil_div.h"
#include "common/cpu/denormals.h"
#include "common/cpu/parallel.h"
#include "pairwise_distance/gradient_cpu.h"
#include "pairwise_distance/tile_cpu.h"

namespace fastmeta {

// Adds the share of a row a of x and a row b of y, with weight w, to both gradients.
struct DifferenceShare {
  template <typename Vec>
  static void add(const Vec& w, const Vec& a, const Vec& b, Vec& grad_a, Vec& grad_b) {
    const Vec difference = a - b;
    grad_a = grad_a - w * difference;
    grad_b = at::vec::fmadd(w, difference, grad_b);
  }
};

struct ProductShare {
  template <typename Vec>
  static void add(const Vec& w, const Vec& a, const Vec& b, Vec& grad_a, Vec& grad_b) {
    grad_a = at::vec::fmadd(w, b, grad_a);
    grad_b = at::vec::fmadd(w, a, grad_b);
  }
};

// Workspace for tasks of one shape; run() does one task.
template <typename scalar_t>
class FewClassesGradient {
  using value_t = acc_t<scalar_t>;
  using Vec = at::vec::Vectorized<value_t>;
  static constexpr int64_t kVectors = 2;      // of a row at a time
  static constexpr int kGroup = 5;            // classes at a time: their sums are in registers
  static constexpr int64_t kBlock = 1 << 16;  // numbers of x in a block: they stay in L2

 public:
  static bool takes(const PairwiseShape& shape) {
    constexpr int64_t kMostClasses = 32;
    return shape.classes <= kMostClasses && shape.features >= kVectors * Vec::size();
  }

  FewClassesGradient(Metric metric, const PairwiseShape& shape)
      : metric_(metric),
        shape_(shape),
        block_rows_(std::min(shape.queries, std::clamp<int64_t>(kBlock / shape.features, 32, 512))),
        y_(shape.classes * shape.features),
        x_(block_rows_ * shape.features),
        grad_x_(is_reduced<scalar_t> ? block_rows_ * shape.features : 0),
        grad_y_(shape.classes * shape.features),
        weights_(block_rows_ * shape.classes + kPastRow),
        inverse_norm_y_(shape.classes),
        inverse_norm_x_(block_rows_) {}

  // Runs one task. weigh(first, rows, x, weights) fills rows [first, first + rows) of W,
  // `shape.classes` wide, given these rows of x, prepared for distance_rows. It may
  // read kPastRow numbers more.
  template <typename Weigh>
  void run(const scalar_t* x, const scalar_t* y, const Weigh& weigh, scalar_t* grad_x,
           scalar_t* grad_y) {
    const int64_t features = shape_.features, classes = shape_.classes;
    const value_t* of_y =
        prepare_rows(metric_, y, classes, features, y_.data(), inverse_norm_y_.data());
    value_t* sums_y = widened_target(grad_y, grad_y_.data());
    for (int64_t first = 0; first < shape_.queries; first += block_rows_) {
      const int64_t rows = std::min(block_rows_, shape_.queries - first);
      const scalar_t* block = x + first * features;
      scalar_t* target = grad_x + first * features;
      value_t* sums_x = widened_target(target, grad_x_.data());
      const value_t* of_x = prepared(block);
      for_rows(rows, [&](int64_t begin, int64_t count) {
        const value_t* ready = prepare_rows(metric_, block + begin * features, count, features,
                                            &x_[begin * features], &inverse_norm_x_[begin]);
        weigh(first + begin, count, ready, &weights_[begin * classes]);
      });
      for_features([&](int64_t d, int64_t count) {
        const Columns columns{rows, of_x + d, of_y + d, sums_x + d, sums_y + d, first > 0};
        is_difference(metric_) ? add_up<DifferenceShare>(columns, count)
                               : add_up<ProductShare>(columns, count);
      });
      for_rows(rows, [&](int64_t begin, int64_t count) {
        finish_rows(begin, count, of_x, inverse_norm_x_, sums_x, target);
      });
    }
    finish_rows(0, classes, of_y, inverse_norm_y_, sums_y, grad_y);
  }

 private:
  // Some features of a block of x, of y, and of their gradients.
  struct Columns {
    int64_t rows;
    const value_t *x, *y;
    value_t *grad_x, *grad_y;
    bool adds_to_y;

    Columns from(int64_t feature) const {
      return {rows, x + feature, y + feature, grad_x + feature, grad_y + feature, adds_to_y};
    }
  };

  // Where prepare_rows leaves the rows of a block.
  const value_t* prepared(const scalar_t* block) const {
    if constexpr (!is_reduced<scalar_t>) {
      if (metric_ != Metric::kCosine) return block;
    }
    return x_.data();
  }

  template <typename Body>
  void for_rows(int64_t rows, const Body& body) const {
    const int64_t grain = std::max<int64_t>(1, kGrain / (shape_.features * shape_.classes));
    parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
      const FlushDenormals flush;
      body(begin, end - begin);
    });
  }

  template <typename Body>
  void for_features(const Body& body) const {
    constexpr int64_t kColumns = kVectors * Vec::size();
    const int64_t chunks = ceil_div(shape_.features, kColumns);
    const int64_t grain = std::max<int64_t>(1, kGrain / (block_rows_ * shape_.classes * kColumns));
    parallel_for(0, chunks, grain, [&](int64_t begin, int64_t end) {
      const FlushDenormals flush;
      for (int64_t c = begin; c < end; ++c) {
        body(c * kColumns, std::min(kColumns, shape_.features - c * kColumns));
      }
    });
  }

  // Adds up `count` features, kVectors vectors at most.
  template <typename Share>
  void add_up(const Columns& columns, int64_t count) {
    if (count == kVectors * Vec::size()) {
      groups<Share, kVectors>(columns, Vec::size());
      return;
    }
    for (int64_t d = 0; d < count; d += Vec::size()) {
      groups<Share, 1>(columns.from(d), std::min<int64_t>(Vec::size(), count - d));
    }
  }

  template <typename Share, int vectors>
  void groups(const Columns& columns, int64_t lanes) {
    const int64_t count = ceil_div(shape_.classes, kGroup);
    for (int64_t g = 0; g < count; ++g) {
      const int64_t first = shape_.classes * g / count, end = shape_.classes * (g + 1) / count;
      group<Share, vectors>(columns, first, end - first, lanes,
                            std::make_integer_sequence<int, kGroup>{});
    }
  }

  template <typename Share, int vectors, int... before>
  void group(const Columns& columns, int64_t first, int64_t classes, int64_t lanes,
             std::integer_sequence<int, before...>) {
    const auto run = [&]<int size>(std::integral_constant<int, size>) {
      lanes == Vec::size() ? sums<Share, vectors, size, true>(columns, first, lanes)
                           : sums<Share, vectors, size, false>(columns, first, lanes);
    };
    ((classes == before + 1 ? run(std::integral_constant<int, before + 1>{}) : void()), ...);
  }

  // Shares of `classes` classes from `first`, in `lanes` lanes of each vector.
  template <typename Share, int vectors, int classes, bool is_whole>
  void sums(const Columns& columns, int64_t first, int64_t lanes) {
    const auto load = [lanes](const value_t* p) {
      return is_whole ? Vec::loadu(p) : Vec::loadu(p, lanes);
    };
    const auto store = [lanes](const Vec& v, value_t* p) {
      is_whole ? v.store(p) : v.store(p, static_cast<int>(lanes));
    };
    const int64_t features = shape_.features;
    const value_t* y = columns.y + first * features;
    Vec of_y[classes][vectors];
#pragma GCC unroll 8
    for (int j = 0; j < classes; ++j) {
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) of_y[j][v] = Vec(value_t(0));
    }
    for (int64_t r = 0; r < columns.rows; ++r) {
      const value_t* weights = &weights_[r * shape_.classes + first];
      const value_t* x = columns.x + r * features;
      value_t* grad_x = columns.grad_x + r * features;
      Vec a[vectors], of_x[vectors];
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) {
        a[v] = load(x + v * Vec::size());
        of_x[v] = first == 0 ? Vec(value_t(0)) : load(grad_x + v * Vec::size());
      }
#pragma GCC unroll 8
      for (int j = 0; j < classes; ++j) {
        const Vec w(weights[j]);
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) {
          const Vec b = load(y + j * features + v * Vec::size());
          Share::add(w, a[v], b, of_x[v], of_y[j][v]);
        }
      }
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) store(of_x[v], grad_x + v * Vec::size());
    }
#pragma GCC unroll 8
    for (int j = 0; j < classes; ++j) {
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) {
        value_t* grad_y = columns.grad_y + (first + j) * features + v * Vec::size();
        store(columns.adds_to_y ? load(grad_y) + of_y[j][v] : of_y[j][v], grad_y);
      }
    }
  }

  // Takes gradients of prepared rows back to the rows; formulas in pairwise_distance.h.
  void finish_rows(int64_t begin, int64_t count, const value_t* rows,
                   const Buffer<value_t>& inverse_norm, value_t* sums, scalar_t* target) const {
    const int64_t features = shape_.features;
    for (int64_t r = begin; metric_ == Metric::kCosine && r < begin + count; ++r) {
      finish_gradient_row(metric_, sums + r * features, rows + r * features, value_t(0),
                          inverse_norm[r], features);
    }
    if constexpr (is_reduced<scalar_t>) {
      narrow(sums + begin * features, target + begin * features, count * features);
    }
  }

  const Metric metric_;
  const PairwiseShape shape_;
  const int64_t block_rows_;
  Buffer<value_t> y_, x_, grad_x_, grad_y_, weights_, inverse_norm_y_, inverse_norm_x_;
};

// Calls body(gradient) with the workspace that suits the shape.
template <typename scalar_t, typename Body>
void with_gradient(Metric metric, const PairwiseShape& shape, const Body& body) {
  if (FewClassesGradient<scalar_t>::takes(shape)) {
    body(FewClassesGradient<scalar_t>(metric, shape));
  } else {
    body(PairwiseGradient<scalar_t>(metric, shape));
  }
}

}  // namespace fastmeta
