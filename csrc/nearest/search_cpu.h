// Search of the nearest rows by products, for many rows of y.
//
// A tile of products x' y' of moved rows, in registers (tile_cpu.h), gives squared distances |x'|^2
// + |y'|^2 - 2 x'.y' but for an error of at most e (|x'|^2 + |y'|^2): one instruction a product. A
// row of y is a candidate if its distance may be within the limit for all that is known of the
// error, so the candidates' distances, summed from differences, decide. A comparison of the scores
//
//   s = x'.y' - (1 - e) |y'|^2 / 2  >  ((1 - e) |x'|^2 - limit) / 2
//
// finds them. Few tiles have any once a row has seen some of y. For dot and cosine s is the product
// itself, and e is 0: a distance is what the tile gives, in one order of summation.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <utility>
#include <vector>

#include "nearest/selection_cpu.h"
#include "pairwise_distance/tile_cpu.h"

namespace fastmeta {

// Rows of y as Search reads them.
template <typename value_t>
class SearchedRows {
 public:
  static constexpr int64_t kPanel = Tile<value_t>::kPanel;

  SearchedRows(Metric metric, const PairwiseShape& shape)
      : metric_(metric),
        rows_(shape.classes),
        features_(shape.features),
        wide_(rows_ * features_),
        panels_(panels() * kPanel * features_),
        center_(features_),
        squares_(panels() * kPanel),
        halves_(panels() * kPanel) {}

  // Whether this repays packing y.
  static bool suits(const PairwiseShape& shape, int64_t k) {
    constexpr int64_t kManyRows = 48, kManyQueries = 32, kManyFeatures = 8, kMostNeighbours = 32;
    return shape.classes >= kManyRows && shape.queries >= kManyQueries &&
           shape.features >= kManyFeatures && k <= kMostNeighbours && 2 * k <= shape.classes;
  }

  // Reads y [rows, features], which must not change while this is read. Returns whether all of them
  // can be compared by products.
  template <typename scalar_t>
  bool prepare(const scalar_t* y) {
    prepared_ = prepare_rows(metric_, y, rows_, features_, wide_.data());
    if (is_difference(metric_)) {
      mean_of_some_rows(prepared_, rows_, features_, center_.data());
    } else {
      std::fill_n(center_.data(), features_, value_t(0));
    }
    const int64_t grain = std::max<int64_t>(1, kGrain / (kPanel * features_));
    parallel_for(0, panels(), grain, [&](int64_t begin, int64_t end) {
      Buffer<value_t> rows(kPanel * features_);
      for (int64_t p = begin; p < end; ++p) pack(p, rows.data());
    });
    // An infinite product may be the least of all.
    return metric_ != Metric::kDot ||
           std::none_of(halves_.data(), halves_.data() + rows_, [](value_t h) { return h > 0; });
  }

  Metric metric() const { return metric_; }
  int64_t rows() const { return rows_; }
  int64_t features() const { return features_; }
  int64_t panels() const { return ceil_div(rows_, kPanel); }
  const value_t* panel(int64_t p) const { return &panels_[p * kPanel * features_]; }
  const value_t* row(int64_t j) const { return prepared_ + j * features_; }
  const value_t* center() const { return center_.data(); }
  value_t square(int64_t j) const { return squares_[j]; }
  // What the score of a row of y lacks to its product; infinite for a row without candidates.
  const value_t* halves(int64_t p) const { return &halves_[p * kPanel]; }

  // e: a product of n terms in order, two squares summed by lanes, the moves, and the bounds have
  // less rounding error than this share of both squares. 0 for product metrics.
  value_t error() const {
    constexpr value_t kUnit = std::numeric_limits<value_t>::epsilon() / 2;
    return is_difference(metric_) ? (value_t(1.5) * features_ + 64) * kUnit : value_t(0);
  }

 private:
  void pack(int64_t p, value_t* rows) {
    const int64_t first = p * kPanel, valid = std::min(kPanel, rows_ - first);
    std::fill_n(&halves_[first], kPanel, std::numeric_limits<value_t>::infinity());
    for (int64_t j = 0; j < valid; ++j) {
      value_t* moved = rows + j * features_;
      const value_t square = move_row(row(first + j), center_.data(), moved, features_);
      squares_[first + j] = square;
      if (std::isfinite(square)) {
        halves_[first + j] = is_difference(metric_) ? (1 - error()) * square / 2 : value_t(0);
      } else {
        std::fill_n(moved, features_, value_t(0));  // no NaN among the scores
      }
    }
    pack_panel_rows(rows, valid, features_, &panels_[first * features_]);
  }

  Metric metric_;
  int64_t rows_, features_;
  Buffer<value_t> wide_, panels_, center_, squares_, halves_;
  const value_t* prepared_ = nullptr;
};

// Workspace for blocks of rows of x.
template <typename value_t>
class Search {
  using Vec = at::vec::Vectorized<value_t>;
  static constexpr int64_t kRows = Tile<value_t>::kRows, kPanel = Tile<value_t>::kPanel;
  static constexpr int64_t kVectors = Tile<value_t>::kVectors;
  static constexpr value_t kInfinity = std::numeric_limits<value_t>::infinity();

 public:
  static constexpr int64_t kBlock = 16 * kRows;

  Search(const SearchedRows<value_t>& y, int64_t k)
      : y_(y),
        k_(k),
        moved_(kBlock * y.features()),
        squares_(kBlock),
        thresholds_(kBlock),
        candidates_(kBlock, Candidates<value_t>(k)) {}

  // Writes the k nearest to each of at most kBlock prepared rows of x. Distances are squared.
  void run(const value_t* x, int64_t rows, Neighbour<value_t>* out) {
    start(x, rows);
    // Panels outside, rows inside: a panel stays in the cache for all rows.
    for (int64_t p = 0; p < y_.panels(); ++p) {
      for (int64_t i = 0; i < rows; i += kRows) tile(p, x, i, std::min(kRows, rows - i));
    }
    for (int64_t r = 0; r < rows; ++r) finish(x + r * y_.features(), r, out + r * k_);
  }

 private:
  void start(const value_t* x, int64_t rows) {
    const int64_t features = y_.features();
    for (int64_t r = 0; r < rows; ++r) {
      value_t* moved = &moved_[r * features];
      squares_[r] = move_row(x + r * features, y_.center(), moved, features);
      candidates_[r].clear();
      thresholds_[r] = threshold(r);
      if (!std::isfinite(squares_[r])) {
        std::fill_n(moved, features, value_t(0));
        thresholds_[r] = kInfinity;  // finish() compares all rows
      }
    }
  }

  void tile(int64_t p, const value_t* x, int64_t first, int64_t rows) {
    using Counts = std::make_integer_sequence<int64_t, kRows>;
    const int64_t features = y_.features();
    value_t sums[kRows * kPanel];
    tile_sums<ProductTerm>(rows, &moved_[first * features], y_.panel(p), features, sums, Counts{});
    Vec halves[kVectors];
#pragma GCC unroll 8
    for (int64_t v = 0; v < kVectors; ++v) {
      halves[v] = Vec::loadu(y_.halves(p) + v * Vec::size());
    }
    for (int64_t r = 0; r < rows; ++r) {
      value_t* scores = sums + r * kPanel;
      Vec best(-kInfinity);
#pragma GCC unroll 8
      for (int64_t v = 0; v < kVectors; ++v) {
        const Vec score = Vec::loadu(scores + v * Vec::size()) - halves[v];
        score.store(scores + v * Vec::size());
        best = at::vec::maximum(best, score);
      }
      if (has_above(best, thresholds_[first + r])) {
        add_candidates(scores, p, x + (first + r) * features, first + r);
      }
    }
  }

  static int above(const Vec& scores, value_t threshold) {
    constexpr int kAll = (1 << Vec::size()) - 1;
    return ~(scores > Vec(threshold)).zero_mask() & kAll;
  }
  static bool has_above(const Vec& scores, value_t threshold) {
    return above(scores, threshold) != 0;
  }

  void add_candidates(const value_t* scores, int64_t p, const value_t* x, int64_t r) {
    for (int64_t v = 0; v < kVectors; ++v) {
      const value_t* part = scores + v * Vec::size();
      int hits = above(Vec::loadu(part), thresholds_[r]);
      for (; hits != 0; hits &= hits - 1) {
        const int lane = __builtin_ctz(static_cast<unsigned>(hits));
        if (part[lane] > thresholds_[r]) add(part[lane], p * kPanel + v * Vec::size() + lane, x, r);
      }
    }
  }

  void add(value_t score, int64_t index, const value_t* x, int64_t r) {
    if (is_difference(y_.metric())) {
      const value_t slack = y_.error() * (squares_[r] + y_.square(index)) + least();
      const value_t lower = base(r) - 2 * score;
      candidates_[r].add(lower, lower + 2 * slack, index, measure(x));
    } else {
      candidates_[r].add(-score, -score, index, measure(x));
    }
    thresholds_[r] = threshold(r);
  }

  // Sum of products that may have been too small for a number.
  value_t least() const { return y_.features() * std::numeric_limits<value_t>::min(); }

  // Lower bound of a squared distance, but for twice the score.
  value_t base(int64_t r) const { return (1 - y_.error()) * squares_[r] - least(); }

  value_t threshold(int64_t r) const {
    const value_t limit = candidates_[r].limit();
    if (limit == kInfinity) return std::numeric_limits<value_t>::lowest();
    return is_difference(y_.metric()) ? (base(r) - limit) / 2 : -limit;
  }

  // The distance of a candidate of a row of x.
  auto measure(const value_t* x) const {
    return [this, x](const Neighbour<value_t>& candidate) {
      if (!is_difference(y_.metric())) return candidate.distance;
      value_t sum;
      RowSums<value_t, DifferenceTerm>::run(1, 1, y_.features(), x, y_.row(candidate.index), &sum,
                                            1);
      return sum;
    };
  }

  void finish(const value_t* x, int64_t r, Neighbour<value_t>* out) {
    // Above this a product, or a bound, may have overflowed.
    constexpr value_t kLarge = std::numeric_limits<value_t>::max() / 8;
    auto& candidates = candidates_[r];
    if (std::isfinite(squares_[r]) && std::abs(candidates.limit()) < kLarge) {
      const auto& found = candidates.finish(measure(x));
      std::copy_n(found.begin(), k_, out);
    } else {
      compare_all(x, out);
    }
  }

  // For a row whose products do not decide: it has NaN, or is very far from all rows but a few.
  void compare_all(const value_t* x, Neighbour<value_t>* out) const {
    const int64_t rows = y_.rows(), features = y_.features();
    Buffer<value_t> distances(rows);
    if (is_difference(y_.metric())) {
      RowSums<value_t, DifferenceTerm>::run(1, rows, features, x, y_.row(0), distances.data(),
                                            rows);
    } else {
      RowSums<value_t, ProductTerm>::run(1, rows, features, x, y_.row(0), distances.data(), rows);
      std::transform(distances.data(), distances.data() + rows, distances.data(), std::negate<>());
    }
    nearest_of(distances.data(), rows, k_, out);
  }

  const SearchedRows<value_t>& y_;
  int64_t k_;
  Buffer<value_t> moved_, squares_, thresholds_;
  std::vector<Candidates<value_t>> candidates_;
};

}  // namespace fastmeta
