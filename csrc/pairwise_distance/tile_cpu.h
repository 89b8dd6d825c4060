// Distances of a few rows of x to all rows of y of one task, in registers.
//
// Of a few classes the terms are summed directly. Two instructions a product (subtract, fused
// multiply-add) instead of a matrix product's one buy distances that are exact at any offset. With
// many features a lane of a vector is a feature, y is not packed, and no lane is empty, however
// few the classes. Else a lane is a class: y is packed once, feature-major in panels of kPanel rows,
// so that a feature of a panel is kVectors vectors; a tile of kRows rows of x against one panel
// keeps kRows x kVectors sums in registers and broadcasts x.
//
// Of many classes matrix products make |x - c|^2 + |y - c|^2 - 2 (x - c).(y - c), with c a mean of
// rows of y, so that a common offset costs no digits. Rows so near each other that more than two
// bits are lost all the same are summed again from differences.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <utility>

#include "common/ceil_div.h"
#include "common/cpu/gemm.h"
#include "common/cpu/parallel.h"
#include "common/cpu/row_sums.h"
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

template <typename value_t>
value_t dot_product(const value_t* x, const value_t* y, int64_t n) {
  using Vec = at::vec::Vectorized<value_t>;
  return at::vec::map2_reduce_all<value_t>([](Vec a, Vec b) { return a * b; },
                                           [](Vec a, Vec b) { return a + b; }, x, y, n);
}

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

// Writes the mean of some rows of y: any point near them will do. A number that is not finite counts
// as 0: it may spoil its own row's distances, not all.
template <typename value_t>
void mean_of_some_rows(const value_t* y, int64_t rows, int64_t features, value_t* center) {
  constexpr int64_t kSome = 64;
  const int64_t step = std::max<int64_t>(1, ceil_div(rows, kSome));
  const value_t share = value_t(1) / static_cast<value_t>(ceil_div(rows, step));
  std::fill_n(center, features, value_t(0));
  for (int64_t j = 0; j < rows; j += step) {
    for (int64_t d = 0; d < features; ++d) {
      const value_t value = y[j * features + d];
      center[d] += std::isfinite(value) ? share * value : value_t(0);
    }
  }
}

// Computes out = row less the center, and returns the square of out.
template <typename value_t>
value_t move_row(const value_t* row, const value_t* center, value_t* out, int64_t features) {
  for (int64_t d = 0; d < features; ++d) out[d] = row[d] - center[d];
  return dot_product(out, out, features);
}

// Packs `valid` rows into a panel, feature by feature. Its missing rows become zeros: they are
// computed, but not stored. `rows` holds a panel of rows.
template <typename value_t>
void pack_panel_rows(value_t* rows, int64_t valid, int64_t features, value_t* panel) {
  constexpr int64_t kPanel = Tile<value_t>::kPanel;
  std::fill(rows + valid * features, rows + kPanel * features, value_t(0));
  transpose(kPanel, features, rows, features, panel, kPanel);
}

inline constexpr int64_t kPastRow = 16;  // numbers behind rows of distances that may be read

// How the sums over features are made.
enum class Summation { kPanels, kFeatures, kProducts };

// Rows of y as distance_rows reads them.
template <typename value_t>
class ClassRows {
 public:
  static constexpr int64_t kPanel = Tile<value_t>::kPanel;

  explicit ClassRows(const PairwiseShape& shape)
      : rows_(shape.classes),
        features_(shape.features),
        summation_(best_for(shape)),
        data_((summation_ == Summation::kPanels ? panels() * kPanel : rows_) * features_),
        moved_(summation_ == Summation::kProducts ? rows_ * features_ : 0),
        center_(features_),
        squares_(rows_) {}

  // Reads y [rows, features], which must not change while this is read.
  template <typename scalar_t>
  void prepare(Metric metric, const scalar_t* y) {
    if (summation_ == Summation::kPanels) return pack(metric, y);
    prepared_ = prepare_rows(metric, y, 0, features_, data_.data());  // of no rows yet
    if (prepared_ == data_.data()) {
      for_rows([&](int64_t begin, int64_t end) {
        const int64_t at = begin * features_;
        prepare_rows(metric, y + at, end - begin, features_, &data_[at]);
      });
    }
    if (summation_ == Summation::kProducts && is_difference(metric)) move_to_mean();
  }

  int64_t rows() const { return rows_; }
  int64_t features() const { return features_; }
  Summation summation() const { return summation_; }
  // Rows of x that stay in the L2 cache beside a part of y, or that repay copies of y in a product.
  int64_t block_of_queries() const { return summation_ == Summation::kProducts ? 128 : 48; }

  int64_t panels() const { return ceil_div(rows_, kPanel); }
  const value_t* panel(int64_t p) const { return data_.data() + p * features_ * kPanel; }
  const value_t* row(int64_t j) const { return prepared_ + j * features_; }

  // For differences by products: rows of y less a mean, and their squares.
  const value_t* moved() const { return moved_.data(); }
  const value_t* squares() const { return squares_.data(); }
  // Computes out = x less this mean, and returns the square of out.
  value_t move_row(const value_t* x, value_t* out) const {
    return fastmeta::move_row(x, center_.data(), out, features_);
  }

 private:
  // Where lanes are features they are added up at the end, in the time of so many features. Where
  // lanes are classes, some are empty.
  static constexpr int64_t kAddingLanes = 4 * Tile<value_t>::Vec::size();

  static Summation best_for(const PairwiseShape& shape) {
    // Products repay moving both sides to the mean.
    constexpr int64_t kManyClasses = 128, kManyQueries = 512, kManyFeatures = 32;
    if (shape.classes >= kManyClasses && shape.queries >= kManyQueries &&
        shape.features >= kManyFeatures) {
      return Summation::kProducts;
    }
    const int64_t lanes = ceil_div(shape.classes, kPanel) * kPanel;
    const bool fills = lanes * shape.features < shape.classes * (shape.features + kAddingLanes);
    return fills ? Summation::kPanels : Summation::kFeatures;
  }

  void move_to_mean() {
    mean_of_some_rows(prepared_, rows_, features_, center_.data());
    for_rows([&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) {
        squares_[j] = move_row(row(j), &moved_[j * features_]);
      }
    });
  }

  template <typename Body>
  void for_rows(const Body& body) const {
    parallel_for(0, rows_, std::max<int64_t>(1, kGrain / features_), body);
  }

  template <typename scalar_t>
  void pack(Metric metric, const scalar_t* y) {
    const int64_t grain = std::max<int64_t>(1, kGrain / (kPanel * std::max<int64_t>(1, features_)));
    parallel_for(0, panels(), grain, [&](int64_t begin, int64_t end) {
      Buffer<value_t> rows(kPanel * features_);
      for (int64_t p = begin; p < end; ++p) pack_panel(metric, y, p, rows.data());
    });
  }

  template <typename scalar_t>
  void pack_panel(Metric metric, const scalar_t* y, int64_t p, value_t* rows) {
    const int64_t valid = std::min(kPanel, rows_ - p * kPanel);
    for (int64_t j = 0; j < valid; ++j) {
      prepare_row(metric, y + (p * kPanel + j) * features_, rows + j * features_, features_);
    }
    pack_panel_rows(rows, valid, features_, data_.data() + p * features_ * kPanel);
  }

  int64_t rows_, features_;
  Summation summation_;
  Buffer<value_t> data_, moved_, center_, squares_;
  const value_t* prepared_ = nullptr;
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

// Sums of Functor for x [rows, features] and packed y.
template <typename Functor, typename value_t>
void sums_by_panels(const value_t* x, int64_t rows, const ClassRows<value_t>& y, value_t* out,
                    int64_t stride) {
  using Rows = std::make_integer_sequence<int64_t, Tile<value_t>::kRows>;
  constexpr int64_t kRows = Tile<value_t>::kRows, kPanel = Tile<value_t>::kPanel;
  std::array<value_t, kRows * kPanel> sums;
  // Panels outside, rows inside: a panel stays in the cache for all rows.
  for (int64_t p = 0; p < y.panels(); ++p) {
    const int64_t columns = std::min(kPanel, y.rows() - p * kPanel);
    for (int64_t i = 0; i < rows; i += kRows) {
      const int64_t n = std::min(kRows, rows - i);
      tile_sums<Functor>(n, x + i * y.features(), y.panel(p), y.features(), sums.data(), Rows{});
      for (int64_t r = 0; r < n; ++r) {
        std::copy_n(&sums[r * kPanel], columns, out + (i + r) * stride + p * kPanel);
      }
    }
  }
}

// Sums of Functor for x [rows, features] and y that is not packed.
template <typename Functor, typename value_t>
void sums_by_features(const value_t* x, int64_t rows, const ClassRows<value_t>& y, value_t* out,
                      int64_t stride) {
  constexpr int64_t kInCache = (16 << 10) / sizeof(value_t);  // half of the L1 cache
  const int64_t columns = std::max<int64_t>(8, kInCache / y.features());
  for (int64_t j = 0; j < y.rows(); j += columns) {
    RowSums<value_t, Functor>::run(rows, std::min(columns, y.rows() - j), y.features(), x, y.row(j),
                                   out + j, stride);
  }
}

// Calls body(first, columns) after out has the products of x and these rows of y, still in the cache.
template <typename value_t, typename Body>
void products_by_parts(const value_t* x, int64_t rows, const value_t* y,
                       const ClassRows<value_t>& of, value_t* out, int64_t stride,
                       const Body& body) {
  constexpr int64_t kColumns = 512;
  const int64_t features = of.features();
  for (int64_t j = 0; j < of.rows(); j += kColumns) {
    const int64_t columns = std::min(kColumns, of.rows() - j);
    gemm<value_t>(rows, columns, features, {x, features}, {y + j * features, features, true},
                  out + j, stride, false);
    body(j, columns);
  }
}

// How far a squared distance is above the share of both squares at which two bits are lost.
template <typename number_t>
number_t kept_digits(const number_t& distance, const number_t& both_squares) {
  return distance - number_t(0.25) * both_squares;
}

// Turns products of moved rows x' y' into squared distances; returns whether some are not exact.
template <typename value_t>
bool finish_products(value_t square_of_x, const value_t* squares_of_y, value_t* row, int64_t n) {
  using Vec = at::vec::Vectorized<value_t>;
  Vec least(value_t(0));
  const auto finish = [&](int64_t j, int64_t count) {
    const Vec both = Vec(square_of_x) + Vec::loadu(squares_of_y + j, count);
    const Vec distance = both - Vec(value_t(2)) * Vec::loadu(row + j, count);
    distance.store(row + j, static_cast<int>(count));
    least = at::vec::minimum(least, kept_digits(distance, both));  // past the end positive
  };
  const int64_t whole = n / Vec::size() * Vec::size();
  for (int64_t j = 0; j < whole; j += Vec::size()) finish(j, Vec::size());
  if (whole < n) finish(whole, n - whole);
  return !(at::vec::vec_reduce_all<value_t>([](Vec a, Vec b) { return at::vec::minimum(a, b); },
                                            least) >= value_t(0));
}

// Squared distances of x [rows, features] to y.
template <typename value_t>
void squares_by_products(const value_t* x, int64_t rows, const ClassRows<value_t>& y, value_t* out,
                         int64_t stride) {
  const int64_t features = y.features();
  Buffer<value_t> moved(rows * features), squares(rows);
  for (int64_t r = 0; r < rows; ++r) {
    squares[r] = y.move_row(x + r * features, &moved[r * features]);
  }
  const auto finish = [&](int64_t first, int64_t columns) {
    for (int64_t r = 0; r < rows; ++r) {
      value_t* row = out + r * stride + first;
      if (!finish_products(squares[r], y.squares() + first, row, columns)) continue;
      for (int64_t j = 0; j < columns; ++j) {
        const value_t both = squares[r] + y.squares()[first + j];
        if (kept_digits(row[j], both) >= 0) continue;
        RowSums<value_t, DifferenceTerm>::run(1, 1, features, x + r * features, y.row(first + j),
                                              row + j, 1);
      }
    }
  };
  products_by_parts(moved.data(), rows, y.moved(), y, out, stride, finish);
}

// Sums of a metric over the features for x [rows, features] and y.
template <typename Term, typename value_t>
void sums_of_rows(const value_t* x, int64_t rows, const ClassRows<value_t>& y, value_t* out,
                  int64_t stride) {
  switch (y.summation()) {
    case Summation::kPanels:
      return sums_by_panels<Term>(x, rows, y, out, stride);
    case Summation::kFeatures:
      return sums_by_features<Term>(x, rows, y, out, stride);
    case Summation::kProducts:
      if constexpr (std::is_same_v<Term, DifferenceTerm>) {
        return squares_by_products(x, rows, y, out, stride);
      } else {
        return products_by_parts(x, rows, y.row(0), y, out, stride, [](int64_t, int64_t) {});
      }
  }
}

// Distances of x, `rows` prepared rows, contiguous, to all of y. out: rows of distances `stride`
// apart.
template <typename value_t>
void distance_rows(Metric metric, const value_t* x, int64_t rows, const ClassRows<value_t>& y,
                   value_t* out, int64_t stride) {
  is_difference(metric) ? sums_of_rows<DifferenceTerm>(x, rows, y, out, stride)
                        : sums_of_rows<ProductTerm>(x, rows, y, out, stride);
  with_metric(metric, [&](auto constant) {
    for (int64_t r = 0; r < rows; ++r) {
      value_t* row = out + r * stride;
      for (int64_t j = 0; j < y.rows(); ++j) row[j] = finish(constant(), row[j]);
    }
  });
}

}  // namespace fastmeta
