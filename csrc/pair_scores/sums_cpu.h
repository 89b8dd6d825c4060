// Sums over features for all pairs of rows of a task: scores, and their tangents.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/ceil_div.h"
#include "common/cpu/parallel.h"
#include "common/cpu/widen.h"
#include "pair_scores/rows_cpu.h"

namespace fastmeta {

// Sums of one row of x with `classes` rows of y. A lane is a feature; lanes add up at the end.
template <typename Term, int classes, typename value_t>
void row_of_sums(const PairPoint<value_t>& point, const value_t* x, const value_t* x_dot,
                 int64_t first, int64_t width, value_t bias, value_t* out) {
  using Vec = at::vec::Vectorized<value_t>;
  Vec sums[classes];
#pragma GCC unroll 8
  for (int j = 0; j < classes; ++j) sums[j] = Vec(value_t(0));
  for (int64_t d = 0; d < width; d += Vec::size()) {
    const Vec a = Vec::loadu(x + d), weight = Vec::loadu(point.weight + d);
    Vec a_dot(value_t(0)), weight_dot(value_t(0));
    if constexpr (Term::kHasDirection) {
      a_dot = Vec::loadu(x_dot + d);
      weight_dot = Vec::loadu(point.weight_dot + d);
    }
#pragma GCC unroll 8
    for (int j = 0; j < classes; ++j) {
      const int64_t place = (first + j) * width + d;
      Vec u_dot = a_dot;
      if constexpr (Term::kHasDirection) u_dot = a_dot + Vec::loadu(point.y_dot + place);
      const Vec u = a + Vec::loadu(point.y + place);
      sums[j] = sums[j] + Term::of(u, u_dot, weight, weight_dot);
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < classes; ++j) {
    out[first + j] =
        bias + at::vec::vec_reduce_all<value_t>([](Vec a, Vec b) { return a + b; }, sums[j]);
  }
}

// Fills out [queries, classes] of a task. Threads own blocks of rows.
template <typename Term, typename scalar_t>
void sums_of_task(const PairScoresShape& shape, const PairPoint<acc_t<scalar_t>>& point,
                  acc_t<scalar_t> bias, scalar_t* out) {
  using value_t = acc_t<scalar_t>;
  constexpr int64_t kRows = 16;  // beside a group of classes they stay in the L1 cache
  const int64_t width = padded_width<value_t>(shape.features), classes = shape.classes;
  const int64_t block_work = std::max<int64_t>(1, kRows * classes * width);
  parallel_for(0, ceil_div(shape.queries, kRows), std::max<int64_t>(1, kGrain / block_work),
               [&](int64_t begin, int64_t end) {
                 Buffer<value_t> wide(is_reduced<scalar_t> ? kRows * classes : 0);
                 for (int64_t b = begin; b < end; ++b) {
                   const int64_t first = b * kRows, rows = std::min(kRows, shape.queries - first);
                   scalar_t* target = out + first * classes;
                   value_t* sums = widened_target(target, wide.data());
                   for_each_group(classes, [&](int64_t group, auto size) {
                     for (int64_t r = 0; r < rows; ++r) {
                       const int64_t row = (first + r) * width;
                       const value_t* x_dot = Term::kHasDirection ? point.x_dot + row : nullptr;
                       row_of_sums<Term, size>(point, point.x + row, x_dot, group, width, bias,
                                               sums + r * classes);
                     }
                   });
                   if constexpr (is_reduced<scalar_t>) narrow(sums, target, rows * classes);
                 }
               });
}

}  // namespace fastmeta
