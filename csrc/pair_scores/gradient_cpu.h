// Sums over all pairs of rows of a task, for each feature: the gradient of scores, and its
// derivative. A lane is a feature.
//
// A piece of work is a block of rows of x and a few vectors of features. It has all classes' sums
// over its rows; sums over blocks are taken behind, in order. What the pieces are depends on the
// shape and not on the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/ceil_div.h"
#include "common/cpu/denormals.h"
#include "common/cpu/parallel.h"
#include "common/cpu/widen.h"
#include "pair_scores/rows_cpu.h"

namespace fastmeta {

// Workspace for tasks of one shape; run() does one task.
template <typename scalar_t, typename Share>
class PairScoresGradient {
  using value_t = acc_t<scalar_t>;
  using Vec = at::vec::Vectorized<value_t>;
  static constexpr int kVectors = 2;                         // of features, in a piece
  static constexpr int64_t kRows = 128, kWantedPieces = 16;  // rows of a block, at least

 public:
  explicit PairScoresGradient(const PairScoresShape& shape)
      : shape_(shape),
        width_(padded_width<value_t>(shape.features)),
        chunks_(ceil_div(width_, kVectors * int64_t(Vec::size()))),
        blocks_(std::clamp<int64_t>(ceil_div(kWantedPieces, std::max<int64_t>(1, chunks_)), 1,
                                    std::max<int64_t>(1, shape.queries / kRows))),
        upstream_(is_reduced<scalar_t> ? shape.queries * shape.classes : 0),
        of_x_(shape.queries * width_),
        of_y_(blocks_ * shape.classes * width_),
        of_weight_(blocks_ * width_) {}

  // upstream [queries, classes]; the gradients are the task's.
  void run(const PairPoint<value_t>& point, const scalar_t* upstream, scalar_t* grad_x,
           scalar_t* grad_y, value_t* grad_weight, value_t* grad_bias) {
    const value_t* g = widen(upstream, upstream_.data(), shape_.queries * shape_.classes);
    const int64_t work = kVectors * Vec::size() * shape_.classes * shape_.queries / blocks_;
    parallel_for(0, blocks_ * chunks_, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, work)),
                 [&](int64_t begin, int64_t end) {
                   const FlushDenormals flush;
                   for (int64_t p = begin; p < end; ++p) piece(point, g, p / chunks_, p % chunks_);
                 });
    const value_t* factor = Share::kNeedsWeight ? point.weight : nullptr;
    finish(of_x_.data(), shape_.queries, 1, factor, grad_x);
    finish(of_y_.data(), shape_.classes, blocks_, factor, grad_y);
    finish(of_weight_.data(), 1, blocks_, static_cast<const value_t*>(nullptr), grad_weight);
    *grad_bias = 0;
    for (int64_t r = 0; r < shape_.queries; ++r) {
      *grad_bias += at::vec::reduce_all<value_t>([](Vec a, Vec b) { return a + b; },
                                                 g + r * shape_.classes, shape_.classes);
    }
  }

 private:
  // Where a block of rows begins.
  int64_t row(int64_t block) const { return shape_.queries * block / blocks_; }

  void piece(const PairPoint<value_t>& point, const value_t* g, int64_t block, int64_t chunk) {
    const int64_t feature = chunk * kVectors * Vec::size();
    const bool is_whole = feature + kVectors * Vec::size() <= width_;
    for_each_group(shape_.classes, [&](int64_t first, auto size) {
      is_whole ? group<kVectors, size>(point, g, block, feature, first)
               : group<1, size>(point, g, block, feature, first);
    });
  }

  // Adds up the pairs of a block of rows with `classes` classes.
  template <int vectors, int classes>
  void group(const PairPoint<value_t>& point, const value_t* g, int64_t block, int64_t feature,
             int64_t first) {
    Vec of_y[classes][vectors], of_weight[vectors], weight[vectors], weight_dot[vectors];
    value_t* weight_sums = &of_weight_[block * width_ + feature];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      const int64_t d = feature + v * Vec::size();
      weight[v] = weight_dot[v] = Vec(value_t(0));
      if constexpr (Share::kHasDirection) {
        weight[v] = Vec::loadu(point.weight + d);
        weight_dot[v] = Vec::loadu(point.weight_dot + d);
      }
      of_weight[v] = Vec(value_t(0));
#pragma GCC unroll 8
      for (int j = 0; j < classes; ++j) of_y[j][v] = Vec(value_t(0));
    }
    for (int64_t r = row(block); r < row(block + 1); ++r) {
      const value_t* upstream = g + r * shape_.classes + first;
      value_t* row_sums = &of_x_[r * width_ + feature];
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) {
        const int64_t d = feature + v * Vec::size();
        const Vec a = Vec::loadu(point.x + r * width_ + d);
        Vec a_dot(value_t(0));
        if constexpr (Share::kHasDirection) a_dot = Vec::loadu(point.x_dot + r * width_ + d);
        Vec of_x = first == 0 ? Vec(value_t(0)) : Vec::loadu(row_sums + v * Vec::size());
#pragma GCC unroll 8
        for (int j = 0; j < classes; ++j) {
          const int64_t place = (first + j) * width_ + d;
          Vec u_dot = a_dot;
          if constexpr (Share::kHasDirection) u_dot = a_dot + Vec::loadu(point.y_dot + place);
          const Vec u = a + Vec::loadu(point.y + place);
          Vec of_rows, of_weights;
          Share::of(Vec(upstream[j]), u, u_dot, weight[v], weight_dot[v], of_rows, of_weights);
          of_x = of_x + of_rows;
          of_y[j][v] = of_y[j][v] + of_rows;
          of_weight[v] = of_weight[v] + of_weights;
        }
        of_x.store(row_sums + v * Vec::size());
      }
    }
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      // A sum of groups' sums: one of all pairs in a row would lose digits.
      const Vec before = first == 0 ? Vec(value_t(0)) : Vec::loadu(weight_sums + v * Vec::size());
      (before + of_weight[v]).store(weight_sums + v * Vec::size());
#pragma GCC unroll 8
      for (int j = 0; j < classes; ++j) {
        const int64_t sum = (block * shape_.classes + first + j) * width_ + feature;
        of_y[j][v].store(&of_y_[sum + v * Vec::size()]);
      }
    }
  }

  // Adds up `parts` of sums [parts, rows, width] into the first, and writes them times the factor.
  template <typename target_t>
  void finish(value_t* sums, int64_t rows, int64_t parts, const value_t* factor, target_t* grad) {
    const int64_t work = std::max<int64_t>(1, parts * width_);
    parallel_for(0, rows, std::max<int64_t>(1, kGrain / work), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        value_t* row = sums + r * width_;
        for (int64_t d = 0; d < width_; d += Vec::size()) {
          Vec sum = Vec::loadu(row + d);
          for (int64_t p = 1; p < parts; ++p) {
            sum = sum + Vec::loadu(row + p * rows * width_ + d);
          }
          (factor == nullptr ? sum : sum * Vec::loadu(factor + d)).store(row + d);
        }
        narrow(row, grad + r * shape_.features, shape_.features);
      }
    });
  }

  const PairScoresShape shape_;
  const int64_t width_, chunks_, blocks_;
  Buffer<value_t> upstream_, of_x_, of_y_, of_weight_;
};

}  // namespace fastmeta
