// Rows as the CPU kernels of pair_scores read them: whole vectors of acc_t, a lane a feature.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "common/ceil_div.h"
#include "common/cpu/widen.h"
#include "execution/cpu/math.h"
#include "pair_scores/pair_scores.h"

namespace fastmeta {

// Features of a row in whole vectors.
template <typename value_t>
int64_t padded_width(int64_t features) {
  constexpr int64_t kSize = at::vec::Vectorized<value_t>::size();
  return ceil_div(features, kSize) * kSize;
}

// Rows of whole vectors: the caller's own if they are such, else a copy with zeros behind.
template <typename scalar_t>
class PaddedRows {
  using value_t = acc_t<scalar_t>;

 public:
  PaddedRows(int64_t rows, int64_t features)
      : rows_(rows),
        features_(features),
        width_(padded_width<value_t>(features)),
        is_copy_(is_reduced<scalar_t> || width_ != features),
        copy_(is_copy_ ? rows * width_ : 0) {}

  // Reads rows [rows, features], contiguous, which must not change while the result is read.
  const value_t* of(const scalar_t* source) {
    if constexpr (!is_reduced<scalar_t>) {
      if (!is_copy_) return source;
    }
    for (int64_t r = 0; r < rows_; ++r) {
      value_t* row = &copy_[r * width_];
      const value_t* wide = widen(source + r * features_, row, features_);
      if (wide != row) std::copy_n(wide, features_, row);
      std::fill(row + features_, row + width_, value_t(0));
    }
    return copy_.data();
  }

 private:
  int64_t rows_, features_, width_;
  bool is_copy_;
  Buffer<value_t> copy_;
};

// A task's operands in padded rows; the direction, weight_dot and all, is null without one.
template <typename value_t>
struct PairPoint {
  const value_t *x, *y, *weight;
  const value_t *x_dot = nullptr, *y_dot = nullptr, *weight_dot = nullptr;
};

// Makes the points of tasks, one at a time.
template <typename scalar_t>
class PairPoints {
  using value_t = acc_t<scalar_t>;

 public:
  explicit PairPoints(const PairScoresOperands& operands)
      : operands_(operands),
        x_(operands.shape.queries, operands.shape.features),
        y_(operands.shape.classes, operands.shape.features),
        weight_(1, operands.shape.features),
        x_dot_(has_direction() ? operands.shape.queries : 0, operands.shape.features),
        y_dot_(has_direction() ? operands.shape.classes : 0, operands.shape.features),
        weight_dot_(1, operands.shape.features) {}

  PairPoint<value_t> of_task(int64_t t) {
    const auto& s = operands_.shape;
    const auto task = [t](const void* rows, int64_t numbers) {
      return static_cast<const scalar_t*>(rows) + t * numbers;
    };
    const auto weights = [t, &s](const void* rows) {
      return static_cast<const value_t*>(rows) + t * s.features;
    };
    const int64_t of_x = s.queries * s.features, of_y = s.classes * s.features;
    PairPoint<value_t> point{x_.of(task(operands_.x, of_x)), y_.of(task(operands_.y, of_y)),
                             weight_.of(weights(operands_.weight))};
    if (has_direction()) {
      point.x_dot = x_dot_.of(task(operands_.x_dot, of_x));
      point.y_dot = y_dot_.of(task(operands_.y_dot, of_y));
      point.weight_dot = weight_dot_.of(weights(operands_.weight_dot));
    }
    return point;
  }

 private:
  bool has_direction() const { return operands_.x_dot != nullptr; }

  const PairScoresOperands operands_;
  PaddedRows<scalar_t> x_, y_;
  PaddedRows<value_t> weight_;
  PaddedRows<scalar_t> x_dot_, y_dot_;
  PaddedRows<value_t> weight_dot_;
};

inline constexpr int kGroup = 5;  // classes at a time: their sums are in registers

template <typename Body, int... before>
void call_with_size(int64_t size, const Body& body, std::integer_sequence<int, before...>) {
  ((size == before + 1 ? body(std::integral_constant<int, before + 1>{}) : void()), ...);
}

// Calls body(first, size) for groups of `classes`, sizes as constants up to kGroup, about equal.
template <typename Body>
void for_each_group(int64_t classes, const Body& body) {
  const int64_t count = ceil_div(classes, int64_t(kGroup));
  for (int64_t g = 0; g < count; ++g) {
    const int64_t first = classes * g / count, end = classes * (g + 1) / count;
    call_with_size(
        end - first, [&](auto size) { body(first, size); },
        std::make_integer_sequence<int, kGroup>{});
  }
}

}  // namespace fastmeta
