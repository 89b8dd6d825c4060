// Products that the threads of a block make together. Operands are of any element type, sums acc_t,
// each in a fixed order. None begins or ends with a barrier.
#pragma once

#include <cstdint>

#include "common/ceil_div.h"
#include "common/cuda/reduce.cuh"
#include "common/cuda/scalar.cuh"

namespace fastmeta {

inline constexpr int kHeadThreads = 512;
inline constexpr int kHeadWarps = kHeadThreads / kWarp;

// Calls body(i) for every i below count; each thread owns some.
template <typename Body>
__device__ void for_each(int64_t count, const Body& body) {
  for (int64_t i = threadIdx.x; i < count; i += kHeadThreads) body(i);
}

// Calls store(i, j, <a_i, b_j>) for rows a [m, depth] and b [n, depth]. A warp owns a tile of 4 x 4
// products, its lanes the depth: loads are coalesced, and each is used four times.
template <typename a_t, typename b_t, typename Store>
__device__ void block_row_dots(int64_t m, int64_t n, int64_t depth, const a_t* a, const b_t* b,
                               const Store& store) {
  constexpr int kTile = 4;
  const int lane = threadIdx.x % kWarp;
  const int64_t columns = ceil_div(n, kTile), tiles = ceil_div(m, kTile) * columns;
  for (int64_t tile = threadIdx.x / kWarp; tile < tiles; tile += kHeadWarps) {
    const int64_t row = tile / columns * kTile, column = tile % columns * kTile;
    acc_t<a_t> sum[kTile][kTile] = {};
    for (int64_t d = lane; d < depth; d += kWarp) {
      acc_t<a_t> left[kTile], right[kTile];
#pragma unroll
      for (int i = 0; i < kTile; ++i) {
        left[i] = row + i < m ? widen(a[(row + i) * depth + d]) : 0;
        right[i] = column + i < n ? widen(b[(column + i) * depth + d]) : 0;
      }
#pragma unroll
      for (int i = 0; i < kTile; ++i) {
#pragma unroll
        for (int j = 0; j < kTile; ++j) sum[i][j] += left[i] * right[j];
      }
    }
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
#pragma unroll
      for (int j = 0; j < kTile; ++j) {
        const auto total = warp_sum(sum[i][j]);
        if (lane == 0 && row + i < m && column + j < n) store(row + i, column + j, total);
      }
    }
  }
}

// Multiplies rows of coefficients by rows of features, for the rows of a tile and one feature:
// sum[i] += sum_j a[j * a_stride + i * a_step] b[j, d].
template <int rows, typename value_t, typename b_t>
__device__ void add_column(value_t (&sum)[rows], int64_t count, int64_t depth, const value_t* a,
                           int64_t a_stride, int64_t a_step, int live, const b_t* b, int64_t d) {
  for (int64_t j = 0; j < count; ++j) {
    const value_t feature = widen(b[j * depth + d]);
#pragma unroll
    for (int i = 0; i < rows; ++i) {
      if (i < live) sum[i] += a[j * a_stride + i * a_step] * feature;
    }
  }
}

// Calls body(first row, rows of it that exist, d) for every tile of rows and every feature: a
// thread owns both.
template <int rows, typename Body>
__device__ void for_each_column(int64_t m, int64_t depth, const Body& body) {
  for (int64_t i = threadIdx.x; i < ceil_div(m, rows) * depth; i += kHeadThreads) {
    const int64_t row = i / depth * rows;
    body(row, static_cast<int>(m - row < rows ? m - row : rows), i % depth);
  }
}

// Computes <a, b> in every lane, by a whole warp.
template <typename a_t, typename b_t>
__device__ acc_t<a_t> warp_dot(int64_t count, const a_t* a, const b_t* b) {
  acc_t<a_t> sum = 0;
  for (int64_t i = threadIdx.x % kWarp; i < count; i += kWarp) sum += widen(a[i]) * widen(b[i]);
  return warp_sum(sum);
}

}  // namespace fastmeta
