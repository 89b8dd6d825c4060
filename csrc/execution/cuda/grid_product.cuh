// Sums of matrix products of all tasks, C [m, n] (+)= bias + sum over pairs of op(A) op(B).
// A block owns a tile of a task's C, and all or a split of the sum (over k, once for each pair); a
// thread 4 x 4 or 8 x 8 sums in registers. Slices of kDepth pass through two halves of shared
// memory: while one is summed, the next is on its way in registers. A tile takes kDepth (kRows +
// kColumns) reads for kDepth kRows kColumns multiplications. If tiles are too few for the device,
// the next launch adds up the splits in order. float32 is IEEE's, or TF32 in tensor cores in the
// two larger tiles if allowed (convolution/cuda/tensor_sums.cuh).
#pragma once

#include <algorithm>
#include <type_traits>

#include "common/ceil_div.h"
#include "common/cuda/copy.cuh"
#include "common/cuda/launch.cuh"
#include "execution/cuda/grid_accessors.cuh"

namespace fastmeta {

// Sizes of a tile; blocks: how many share a multiprocessor.
template <int rows, int columns, int depth, int m, int n, int blocks>
struct ProductTile {
  static constexpr int kRows = rows, kColumns = columns, kDepth = depth, kM = m, kN = n;
  static constexpr int kLaneColumns = columns / n, kThreads = rows / m * kLaneColumns;
  static constexpr int kBlocks = blocks;
  // Shifts B against A by 4 words, so that stores of both along k meet different banks.
  static constexpr int kPad = 4;
  static constexpr int kWidth = rows + columns + 2 * kPad;  // of a slice's row: A's, then B's
};
template <typename value_t>  // double, so deep, would not fit the registers
using SkinnyProduct = ProductTile<16, 64, sizeof(value_t) == 4 ? 32 : 16, 4, 4, 4>;
using SmallProduct = ProductTile<32, 64, 16, 4, 4, 2>;
using LargeProduct = ProductTile<64, 128, 8, 8, 8, 1>;
inline constexpr int kProductGroup = 4;  // neighbouring columns that a thread sums
inline constexpr int64_t kMostPartsOfMultiprocessor = 4 * 16 * 64;  // numbers: blocks x tile

template <typename value_t>
struct GridProduct {
  Product<value_t> p;
  int64_t row_tiles, column_tiles;
  int64_t splits, split_slices;  // slices of a split
  Array<acc_t<value_t>> parts;   // [splits, m, n], if several
};

template <typename Tile, typename value_t>
GridProduct<value_t> in_tiles(const Product<value_t>& p) {
  const int64_t slices = ceil_div(p.k, Tile::kDepth) * p.pairs;
  return {p, ceil_div(p.m, Tile::kRows), ceil_div(p.n, Tile::kColumns), 1, slices, {}};
}

// Splits the sums of `tiles` tiles among `wanted` blocks; parts: address of the partial sums.
template <typename value_t>
void split_sums(GridProduct<value_t>& g, int64_t tiles, int64_t wanted, acc_t<value_t>* parts) {
  constexpr int64_t kSplitSlices = 4;  // worth a block
  const int64_t slices = g.split_slices;
  // A shorter split would cost more in the sum of parts than it saves.
  const int64_t most = std::max<int64_t>(1, slices / kSplitSlices);
  g.split_slices =
      ceil_div(slices, std::clamp<int64_t>(wanted / std::max<int64_t>(1, tiles), 1, most));
  g.splits = std::max<int64_t>(1, ceil_div(slices, std::max<int64_t>(1, g.split_slices)));
  g.parts = {parts, g.splits * g.p.m * g.p.n};
}

// Offset in a slice of number k of an outer, a row of A or column of B. Rows of `width` words run
// along the outers; a word of half types has two neighbours in k.
template <typename value_t>
__device__ int in_slice(int k, int outer, int width) {
  constexpr int kTwo = kInWord<value_t>;
  return (k / kTwo * width + outer) * kTwo + k % kTwo;
}

// A thread's share of one operand's slices on their way from global to shared memory. Neighbouring
// threads read neighbouring numbers: along k, or across it ("outer").
template <typename value_t, int kOuters, int kDepth, int kThreads>
class OperandSlices {
  static constexpr int kCount = kOuters * kDepth / kThreads;
  static_assert(kThreads % kOuters == 0 && kThreads % kDepth == 0 && kCount > 0);

 public:
  __device__ OperandSlices(bool along_k, int64_t first, int64_t outers, int64_t k)
      : k_left_(k), k_stride_(along_k ? 1 : outers) {
    const int thread = threadIdx.x;
    outer_ = along_k ? thread / kDepth : thread % kOuters;
    depth_ = along_k ? thread % kDepth : thread / kOuters;
    outer_step_ = along_k ? kThreads / kDepth : 0;
    depth_step_ = along_k ? 0 : kThreads / kOuters;
    const int64_t outer_stride = along_k ? k : 1;
    start_ = (first + outer_) * outer_stride + depth_ * k_stride_;
    step_ = outer_step_ * outer_stride + depth_step_ * k_stride_;
    outers_left_ = outers - first;
  }

  // Starts the loads of the slice from k on; zero past the ends.
  __device__ void fetch(const value_t* data, int64_t k) {
    const value_t* source = data + start_ + k * k_stride_;
#pragma unroll
    for (int i = 0; i < kCount; ++i, source += step_) {
      const bool is_there =
          outer_ + i * outer_step_ < outers_left_ && k + depth_ + i * depth_step_ < k_left_;
      // Zeros add nothing, so sums need no bounds.
      raw_[i] = is_there ? *source : value_t{};
    }
  }

  __device__ void store(value_t* slice, int width) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int k = depth_ + i * depth_step_;
      slice[in_slice<value_t>(k, outer_ + i * outer_step_, width)] = raw_[i];
    }
  }

 private:
  int64_t k_left_, k_stride_, outers_left_, start_, step_;
  int outer_, depth_, outer_step_, depth_step_;
  value_t raw_[kCount];
};

// A thread's sums, 4 neighbouring rows and columns at a time.
template <typename value_t, typename Tile>
struct ThreadSums {
  static constexpr int kGroup = kProductGroup;
  static constexpr int kRowGroups = Tile::kM / kGroup, kColumnGroups = Tile::kN / kGroup;
  using Numbers = Pack<value_t, kGroup>;
  value_t sum[Tile::kM][Tile::kN] = {};

  static __device__ int row(int i) {
    return threadIdx.x / Tile::kLaneColumns * kGroup + i / kGroup * (Tile::kRows / kRowGroups) +
           i % kGroup;
  }
  static __device__ int column(int j) {
    return threadIdx.x % Tile::kLaneColumns * kGroup +
           j / kGroup * (Tile::kColumns / kColumnGroups) + j % kGroup;
  }

  // Index of this thread among those with the same columns.
  static __device__ int row_lane() { return threadIdx.x / Tile::kLaneColumns; }

  // Sums j, j + 1, .. of row i, as many as a pack holds.
  __device__ Numbers group(int i, int j) const {
    Numbers numbers;
#pragma unroll
    for (int c = 0; c < kGroup; ++c) numbers[c] = sum[i][j + c];
    return numbers;
  }

  __device__ void add(const value_t* slice) {
#pragma unroll
    for (int k = 0; k < Tile::kDepth; ++k) {
      const auto* a = as_packs<kGroup>(slice + k * Tile::kWidth);
      const auto* b = as_packs<kGroup>(slice + k * Tile::kWidth + Tile::kRows + Tile::kPad);
      Numbers left[kRowGroups], right[kColumnGroups];
#pragma unroll
      for (int g = 0; g < kRowGroups; ++g) left[g] = a[row(g * kGroup) / kGroup];
#pragma unroll
      for (int g = 0; g < kColumnGroups; ++g) right[g] = b[column(g * kGroup) / kGroup];
#pragma unroll
      for (int i = 0; i < Tile::kM; ++i) {
#pragma unroll
        for (int j = 0; j < Tile::kN; ++j) {
          sum[i][j] += left[i / kGroup][i % kGroup] * right[j / kGroup][j % kGroup];
        }
      }
    }
  }
};

// Position of a block: its task, its tile of C, and its part of the sum.
template <typename Tile>
struct ProductPlace {
  int64_t task, split, row, column;

  template <typename value_t>
  __device__ explicit ProductPlace(const GridProduct<value_t>& g) {
    // Neighbouring blocks share rows of A, which then come from the L2 cache.
    int64_t block = blockIdx.x;
    column = block % g.column_tiles * Tile::kColumns;
    block /= g.column_tiles;
    row = block % g.row_tiles * Tile::kRows;
    block /= g.row_tiles;
    split = block % g.splits;
    task = block / g.splits;
  }
};

// Computes the sums of the block's tile, from the slices of its split of operands a and b.
template <typename Sums, typename Tile, typename value_t, typename Left, typename Right>
__device__ Sums sums_of_slices(const GridProduct<value_t>& g, const ProductPlace<Tile>& place,
                               Left& a, Right& b) {
  __shared__ __align__(kAccessBytes) value_t slices[2][Tile::kDepth * Tile::kWidth];
  const auto& p = g.p;
  const int64_t of_pair = ceil_div(p.k, Tile::kDepth), all = of_pair * p.pairs;
  const auto fetch = [&](int64_t slice) {
    // Both pairs are one sum of 2 of_pair slices: the second continues where the first ends.
    const bool is_first = slice < of_pair;
    const int64_t k = (is_first ? slice : slice - of_pair) * Tile::kDepth;
    const Array<value_t> left = is_first ? p.a[0] : p.a[1], right = is_first ? p.b[0] : p.b[1];
    a.fetch(left.data + place.task * left.task_stride, k);
    b.fetch(right.data + place.task * right.task_stride, k);
  };
  const auto store = [&](int half) {
    a.store(slices[half], Tile::kWidth);
    b.store(slices[half] + in_slice<value_t>(0, Tile::kRows + Tile::kPad, Tile::kWidth),
            Tile::kWidth);
  };
  Sums sums;
  int64_t slice = place.split * g.split_slices;
  const int64_t end = slice + g.split_slices < all ? slice + g.split_slices : all;
  if (slice < end) {
    fetch(slice);
    store(0);
  }
  for (int half = 0; slice < end; ++slice, half ^= 1) {
    __syncthreads();
    if (slice + 1 < end) fetch(slice + 1);
    sums.add(slices[half]);
    // Into the half that was summed before the last barrier: one barrier a slice suffices.
    if (slice + 1 < end) store(half ^ 1);
  }
  return sums;
}

template <typename Sums, typename Tile, typename value_t>
__device__ Sums tile_sums(const GridProduct<value_t>& g, const ProductPlace<Tile>& place) {
  const auto& p = g.p;
  OperandSlices<value_t, Tile::kRows, Tile::kDepth, Tile::kThreads> a(p.form != Form::kTN,
                                                                      place.row, p.m, p.k);
  OperandSlices<value_t, Tile::kColumns, Tile::kDepth, Tile::kThreads> b(p.form == Form::kNT,
                                                                         place.column, p.n, p.k);
  return sums_of_slices<Sums>(g, place, a, b);
}

// Destination of sums: rows of n numbers.
template <typename value_t>
struct ProductTarget {
  using sum_t = acc_t<value_t>;
  value_t* c;
  sum_t* part;          // of half types, their destination if they are parts; else null
  const value_t* bias;  // or null
  int64_t m, n;
  bool adds, wide;
  sum_t factor = 1;  // multiplies sums

  __device__ ProductTarget(const GridProduct<value_t>& g, int64_t task, int64_t split)
      : m(g.p.m), n(g.p.n) {
    const auto& p = g.p;
    const bool is_part = g.splits > 1;
    c = p.c.data + task * p.c.task_stride;
    part = is_part ? g.parts.data + task * g.parts.task_stride + split * m * n : nullptr;
    if constexpr (!is_reduced<value_t>) c = is_part ? part : c;
    bias = is_part || !p.bias ? nullptr : p.bias.data + task * p.bias.task_stride;
    // Parts are plain sums; the next launch adds, scales and finishes.
    adds = p.into.adds && !is_part;
    if (adds && p.into.step_size)
      factor = -widen(p.into.step_size.data[task * p.into.step_size.task_stride]);
    const auto start = is_part ? reinterpret_cast<uintptr_t>(part) : reinterpret_cast<uintptr_t>(c);
    // Rows of whole packs, all aligned if the first one is.
    wide = n % kProductGroup == 0 && start % kAccessBytes == 0;
  }

  // Stores `numbers` from a place on, only those within the row.
  template <int count>
  __device__ void store(int64_t row, int64_t column, Pack<sum_t, count> numbers) const {
    if (bias != nullptr) {
#pragma unroll
      for (int j = 0; j < count; ++j) {
        numbers[j] += column + j < n ? widen(bias[column + j]) : sum_t(0);
      }
    }
    if constexpr (is_reduced<value_t>) {
      if (part != nullptr) return store_in(part, row, column, numbers);
    }
    store_in(c, row, column, numbers);
  }

 private:
  template <typename stored_t, int count>
  __device__ void store_in(stored_t* array, int64_t row, int64_t column,
                           Pack<sum_t, count> numbers) const {
    stored_t* target = array + row * n + column;
    if (wide && column < n) {
      auto* place = as_packs<count>(target);
      if (adds) {
        const auto before = *place;
#pragma unroll
        for (int j = 0; j < count; ++j) numbers[j] = widen(before[j]) + factor * numbers[j];
      }
      *place = narrow<stored_t>(numbers);
      return;
    }
#pragma unroll
    for (int j = 0; j < count; ++j) {
      if (column + j >= n) continue;
      const sum_t sum = adds ? widen(target[j]) + factor * numbers[j] : numbers[j];
      target[j] = narrow<stored_t>(sum);
    }
  }
};

template <typename Sums, typename Tile, typename value_t, typename Finish>
__global__ void __launch_bounds__(Tile::kThreads, 2)
    product_kernel(GridProduct<value_t> g, Finish finish) {
  const ProductPlace<Tile> place(g);
  const ProductTarget<value_t> target(g, place.task, place.split);
  const Sums sums = tile_sums<Sums>(g, place);
#pragma unroll
  for (int i = 0; i < Tile::kM; ++i) {
    const int64_t row = place.row + Sums::row(i);
    if (row >= target.m) continue;
#pragma unroll
    for (int j = 0; j < Tile::kN; j += Sums::kGroup) {
      target.store(row, place.column + Sums::column(j), sums.group(i, j));
    }
  }
  if constexpr (!std::is_same_v<Finish, NoFinish>) {
    if (g.splits > 1) return;  // the next launch adds up the parts
#pragma unroll 1
    for (int i = 0; i < Tile::kM * Tile::kN; ++i) {
      const int64_t row = place.row + Sums::row(i / Tile::kN);
      const int64_t column = place.column + Sums::column(i % Tile::kN);
      if (row < target.m && column < target.n) {
        finish(GlobalAccessor<value_t>{place.task, row * target.n + column});
      }
    }
  }
}

// Adds up the parts of an element of C, then finish.
template <typename value_t, typename Finish>
struct SumOfParts {
  GridProduct<value_t> g;
  Finish finish;

  __device__ void operator()(const GlobalAccessor<value_t>& at) const {
    const auto& p = g.p;
    value_t sum = p.bias ? at.load_one(p.bias, at.index % p.n) : value_t(0);
    for (int64_t s = 0; s < g.splits; ++s) sum += at.load(g.parts, s * p.m * p.n);
    store_sum(at, p.c, p.into, sum);
    finish(at);
  }
};

}  // namespace fastmeta
