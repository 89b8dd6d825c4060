// Distances of a few rows of x to all rows of y of one task, in registers.
//
// y is packed once, feature-major in panels of kPanel rows: a feature of a panel is kVectors
// vectors. A tile of kRows rows of x against one panel keeps kRows x kVectors sums in registers and
// broadcasts x. Two instructions a product (subtract, fused multiply-add) instead of a matrix
// product's one buy distances that are exact at any offset.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <utility>

#include "common/cpu/parallel.h"
#include "common/cpu/transpose.h"
#include "common/cpu/widen.h"
#include "pairwise_distance/pairwise_distance.h"

namespace fastmeta {

template <typename value_t>
struct Tile {
  using Vec = at::vec::Vectorized<value_t>;
  static constexpr bool kWide = sizeof(Vec) >= 64;  // 32 registers instead of 16
  static constexpr int64_t kRows = kWide ? 6 : 4;
  static constexpr int64_t kVectors = kWide ? 4 : 2;
  static constexpr int64_t kPanel = kVectors * Vec::size();
};

// Writes a row as acc_t, divided by its norm for cosine. Returns 1 / max(norm, eps), or 1.
template <typename scalar_t>
acc_t<scalar_t> prepare_row(Metric metric, const scalar_t* row, acc_t<scalar_t>* out,
                            int64_t features) {
  using value_t = acc_t<scalar_t>;
  using Vec = at::vec::Vectorized<value_t>;
  const value_t* wide = widen(row, out, features);
  if (metric != Metric::kCosine) {
    // widen() wrote to `out` only for half types.
    if (wide != out) std::copy_n(wide, features, out);
    return 1;
  }
  const value_t square = at::vec::map_reduce_all<value_t>(
      [](Vec x) { return x * x; }, [](Vec a, Vec b) { return a + b; }, wide, features);
  const value_t inverse = 1 / std::max(std::sqrt(square), value_t(kCosineEps));
  at::vec::map<value_t>([inverse](Vec x) { return x * Vec(inverse); }, out, wide, features);
  return inverse;
}

// Calls prepare_row on consecutive rows. Returns the rows' own memory if nothing has to change,
// else `scratch`. For cosine, `inverse_norms` gets the results of prepare_row, unless it is null.
template <typename scalar_t>
const acc_t<scalar_t>* prepare_rows(Metric metric, const scalar_t* x, int64_t rows,
                                    int64_t features, acc_t<scalar_t>* scratch,
                                    acc_t<scalar_t>* inverse_norms = nullptr) {
  if constexpr (!is_reduced<scalar_t>) {
    if (metric != Metric::kCosine) return x;
  }
  for (int64_t r = 0; r < rows; ++r) {
    const auto inverse = prepare_row(metric, x + r * features, scratch + r * features, features);
    if (inverse_norms) inverse_norms[r] = inverse;
  }
  return scratch;
}

template <typename value_t>
class Panels {
 public:
  static constexpr int64_t kPanel = Tile<value_t>::kPanel;

  Panels(int64_t rows, int64_t features)
      : rows_(rows), features_(features), data_(count() * features * kPanel) {}

  template <typename scalar_t>
  void pack(Metric metric, const scalar_t* y) {
    const int64_t grain = std::max<int64_t>(1, kGrain / (kPanel * std::max<int64_t>(1, features_)));
    parallel_for(0, count(), grain, [&](int64_t begin, int64_t end) {
      Buffer<value_t> rows(kPanel * features_);
      for (int64_t p = begin; p < end; ++p) pack_panel(metric, y, p, rows.data());
    });
  }

  int64_t rows() const { return rows_; }
  int64_t features() const { return features_; }
  int64_t count() const { return (rows_ + kPanel - 1) / kPanel; }
  const value_t* panel(int64_t p) const { return data_.data() + p * features_ * kPanel; }

 private:
  template <typename scalar_t>
  void pack_panel(Metric metric, const scalar_t* y, int64_t p, value_t* rows) {
    const int64_t valid = std::min(kPanel, rows_ - p * kPanel);
    for (int64_t j = 0; j < valid; ++j) {
      prepare_row(metric, y + (p * kPanel + j) * features_, rows + j * features_, features_);
    }
    // The last panel's missing rows: computed, but not stored.
    std::fill(rows + valid * features_, rows + kPanel * features_, value_t(0));
    transpose(kPanel, features_, rows, features_, data_.data() + p * features_ * kPanel, kPanel);
  }

  int64_t rows_, features_;
  Buffer<value_t> data_;
};

// Sums of Functor over the features, for kRows rows of x, `features` apart, against one panel.
template <typename Functor, int64_t kRows, typename value_t>
void tile_sums(const value_t* x, const value_t* panel, int64_t features, value_t* sums) {
  using Vec = at::vec::Vectorized<value_t>;
  constexpr int64_t kVectors = Tile<value_t>::kVectors, kPanel = Tile<value_t>::kPanel;
  Vec sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int64_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int64_t v = 0; v < kVectors; ++v) sum[r][v] = Vec(value_t(0));
  }
  for (int64_t d = 0; d < features; ++d) {
    Vec y[kVectors];
#pragma GCC unroll 8
    for (int64_t v = 0; v < kVectors; ++v) y[v] = Vec::loadu(panel + d * kPanel + v * Vec::size());
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r) {
      // One load of x serves kVectors vectors of y.
      const Vec broadcast(x[r * features + d]);
#pragma GCC unroll 8
      for (int64_t v = 0; v < kVectors; ++v) sum[r][v] = Functor::add(sum[r][v], broadcast, y[v]);
    }
  }
#pragma GCC unroll 8
  for (int64_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int64_t v = 0; v < kVectors; ++v) sum[r][v].store(sums + r * kPanel + v * Vec::size());
  }
}

// Calls tile_sums for a row count known at run time, 1 <= rows <= Tile::kRows.
template <typename Functor, typename value_t, int64_t... kRow>
void tile_sums(int64_t rows, const value_t* x, const value_t* panel, int64_t features,
               value_t* sums, std::integer_sequence<int64_t, kRow...>) {
  ((rows == kRow + 1 ? tile_sums<Functor, kRow + 1>(x, panel, features, sums) : void()), ...);
}

// Distances of x, `rows` prepared rows, contiguous, to all of y. out: rows of distances `stride`
// apart.
template <typename value_t>
void distance_rows(Metric metric, const value_t* x, int64_t rows, const Panels<value_t>& y,
                   value_t* out, int64_t stride) {
  using Rows = std::make_integer_sequence<int64_t, Tile<value_t>::kRows>;
  constexpr int64_t kRows = Tile<value_t>::kRows, kPanel = Tile<value_t>::kPanel;
  std::array<value_t, kRows * kPanel> sums;
  // Panels outside, rows inside: a panel stays in the cache for all rows.
  for (int64_t p = 0; p < y.count(); ++p) {
    const int64_t columns = std::min(kPanel, y.rows() - p * kPanel);
    for (int64_t i = 0; i < rows; i += kRows) {
      const int64_t n = std::min(kRows, rows - i);
      const value_t* first = x + i * y.features();
      if (is_difference(metric)) {
        tile_sums<DifferenceTerm>(n, first, y.panel(p), y.features(), sums.data(), Rows{});
      } else {
        tile_sums<ProductTerm>(n, first, y.panel(p), y.features(), sums.data(), Rows{});
      }
      with_metric(metric, [&](auto constant) {
        for (int64_t r = 0; r < n; ++r) {
          value_t* target = out + (i + r) * stride + p * kPanel;
          const value_t* sum = &sums[r * kPanel];
          for (int64_t j = 0; j < columns; ++j) target[j] = finish(constant(), sum[j]);
        }
      });
    }
  }
}

}  // namespace fastmeta
