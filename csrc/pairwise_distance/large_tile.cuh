// Tile of pairwise sums for large arrays: the scheme of a matrix product.
//
// Squared differences cost two instructions a product if summed directly. Here the tile computes |x
// - c|^2 + |y - c|^2 - 2 (x - c).(y - c), one instruction a product, with c near the rows of y, so
// that a common offset costs no digits. If rows are so near each other that more than two bits are
// lost all the same, their distance is summed again from differences.
//
// Slices of kDepth features pass through two halves of shared memory, feature by feature: while one
// is summed, the next is under way. Lanes that share rows, or columns, differ in one of the lowest
// two bits: so halves of a warp, not quarters, read 16 bytes a lane at once.
#pragma once

#include <limits>

#include "common/cuda/multiprocessors.cuh"
#include "pairwise_distance/tile.cuh"

namespace fastmeta {

// 64 x 128 sums: 8 x 8 a lane, 4 x 8 lanes a warp, 2 x 2 warps.
struct LargeTile {
  static constexpr int kM = 8, kN = 8;
  static constexpr int kLaneColumns = 8, kLaneColumnStep = 2;
  static constexpr int kWarpRows = 2, kWarpColumns = 2;
  static constexpr int kRows = 64, kColumns = 128;
  static constexpr int kThreads = kWarp * kWarpRows * kWarpColumns;
  static constexpr int kBlocks = 3;              // a multiprocessor's, at 168 registers a thread
  static constexpr int kDepth = 8, kAccess = 4;  // features of a slice, of an access
  static constexpr int kSlice = kDepth * (kRows + kColumns) + kDepth / kAccess * 16;
  static constexpr int kSharedBytes = (2 * kSlice + kRows + kColumns) * sizeof(float);

  // Row in the tile of this lane's distances [i][..], and column of its distances [..][j].
  static __device__ int row(int i) {
    const int warp = threadIdx.x / kWarp / kWarpColumns, lane = threadIdx.x % kWarp;
    return warp * 32 + (lane / 16 * 2 + lane % 2) * kM + i;
  }
  static __device__ int column(int j) {
    return warp_column() * 64 + lane_column() + j * kLaneColumns;
  }
  static __device__ int warp_column() { return threadIdx.x / kWarp % kWarpColumns; }
  static __device__ int lane_column() { return threadIdx.x / kLaneColumnStep % kLaneColumns; }
  static __device__ bool is_first_lane_of_row() { return lane_column() == 0; }

  // Offset of feature k in a slice: first its rows of x, then its rows of y. Every access of
  // features is 16 numbers further on, so that a warp that writes 16 rows of 2 accesses meets 32
  // banks.
  static __device__ int feature(int k) { return k * (kRows + kColumns) + k / kAccess * 16; }

  // Place of column c among the rows of y: neighbouring lanes own neighbouring columns, for the
  // sake of arrays of distances, but each reads the 4 columns of an access together.
  static __device__ int place(int c) { return c / 32 * 32 + c % 8 * 4 + c / 8 % 4; }
};

// Whether `tiles` large tiles are enough for all multiprocessors, and small ones too small. Always
// false for double, whose large tile would not fit into the registers.
inline bool uses_large_tiles(const PairwiseOperands& operands, int64_t tiles) {
  return operands.dtype != Dtype::kDouble && operands.shape.classes > SmallTile::kColumns &&
         tiles >= multiprocessors();
}

// Calls body(tile).
template <typename scalar_t, typename Body>
cudaError_t with_tile(const PairwiseOperands& operands, const Body& body) {
  if constexpr (!std::is_same_v<scalar_t, double>) {
    if (operands.large_tiles) return body(LargeTile{});
  }
  return body(SmallTile{});
}

__device__ inline int64_t smaller_of(int64_t a, int64_t b) { return a < b ? a : b; }

// A thread's share of one operand's slices on their way from global to shared memory: kAccess
// features of each kStep-th row. Rows past the end repeat the last one.
template <int kTileRows, typename scalar_t>
class SliceRows {
  static constexpr int n = LargeTile::kAccess, kLanes = LargeTile::kDepth / n;
  static constexpr int kStep = LargeTile::kThreads / kLanes, kCount = kTileRows / kStep;
  static_assert(kTileRows % kStep == 0);

 public:
  // Constructor; `place`: place of row first() among the operand's rows in a slice.
  __device__ SliceRows(const Rows<scalar_t>& rows, int64_t first_row, int place)
      : place_(place), wide_(rows.wide) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int64_t r = smaller_of(first_row + first() + i * kStep, rows.count - 1);
      source_[i] = rows.data + r * rows.features + first_feature();
      scale_[i] = rows.inverse_norm(r);
    }
  }

  static __device__ int first() { return threadIdx.x / kLanes; }
  static __device__ int first_feature() { return threadIdx.x % kLanes * n; }

  // Starts the loads of the next slice, which has `features` features; zero past them.
  __device__ void fetch(int features) {
    const int left = features - first_feature();
#pragma unroll
    for (int i = 0; i < kCount; ++i) raw_[i] = {};
    if (wide_) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (left > 0) raw_[i] = *as_packs<n>(source_[i]);
      }
    } else {
#pragma unroll
      for (int k = 0; k < n; ++k) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          if (left > k) raw_[i][k] = source_[i][k];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) source_[i] += LargeTile::kDepth;
  }

  // Writes the fetched numbers, normalised for cosine, to a slice that begins with this operand.
  __device__ void store(float* slice) const {
    store_each([&](int i, int k) { return widen(raw_[i][k]) * scale_[i]; }, slice);
  }

  // Writes the fetched numbers minus the center.
  __device__ void store_less(const Pack<float, n>& center, float* slice) const {
    store_each([&](int i, int k) { return widen(raw_[i][k]) - center[k]; }, slice);
  }

 private:
  template <typename ValueOf>
  __device__ void store_each(const ValueOf& value_of, float* slice) const {
    slice += LargeTile::feature(first_feature()) + place_;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
#pragma unroll
      for (int k = 0; k < n; ++k) slice[LargeTile::feature(k) + i * kStep] = value_of(i, k);
    }
  }

  int place_;
  bool wide_;
  const scalar_t* source_[kCount];
  float scale_[kCount];
  Pack<scalar_t, n> raw_[kCount];
};

// Slices of a tile, one after the other.
template <typename scalar_t>
class Slices {
  using XRows = SliceRows<LargeTile::kRows, scalar_t>;
  using YRows = SliceRows<LargeTile::kColumns, scalar_t>;

 public:
  __device__ Slices(const Rows<scalar_t>& x, int64_t first_row, const Rows<scalar_t>& y,
                    int64_t first_column)
      : x_(x, first_row, XRows::first()),
        y_(y, first_column, LargeTile::place(YRows::first())),
        left_(x.features == 0 ? 1 : static_cast<int>(ceil_div(x.features, LargeTile::kDepth))),
        in_last_(static_cast<int>(x.features - (left_ - 1) * int64_t(LargeTile::kDepth))) {}

  __device__ int left() const { return left_; }  // to fetch; at least one, if only of zeros

  __device__ void fetch() {
    const int features = --left_ > 0 ? LargeTile::kDepth : in_last_;
    x_.fetch(features);
    y_.fetch(features);
  }

  __device__ void store(float* slice) const {
    x_.store(slice);
    y_.store(slice + LargeTile::kRows);
  }

  // Subtracts the center, given at the slice's first feature.
  __device__ void store_less(const float* center, float* slice) const {
    const auto own = *as_packs<LargeTile::kAccess>(center + XRows::first_feature());
    x_.store_less(own, slice);
    y_.store_less(own, slice + LargeTile::kRows);
  }

 private:
  XRows x_;
  YRows y_;
  int left_, in_last_;
};

// Adds the terms of a slice.
template <typename Term>
__device__ void add_slice(const float* slice, float (&sums)[LargeTile::kM][LargeTile::kN]) {
  constexpr int kM = LargeTile::kM, kN = LargeTile::kN, n = kAccess<float>;
  const auto* x_packs = as_packs<n>(slice + LargeTile::row(0));
  const auto* y_packs =
      as_packs<n>(slice + LargeTile::kRows + LargeTile::place(LargeTile::column(0)));
#pragma unroll
  for (int k = 0; k < LargeTile::kDepth; ++k) {
    const int first = LargeTile::feature(k) / n;
    Pack<float, n> x[kM / n], y[kN / n];
#pragma unroll
    for (int i = 0; i < kM / n; ++i) x[i] = x_packs[first + i];
#pragma unroll
    for (int j = 0; j < kN / n; ++j) y[j] = y_packs[first + j * 32 / n];
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        sums[i][j] = Term::add(sums[i][j], x[i / n][i % n], y[j / n][j % n]);
      }
    }
  }
}

__device__ inline void clear(float (&sums)[LargeTile::kM][LargeTile::kN]) {
#pragma unroll
  for (int i = 0; i < LargeTile::kM; ++i) {
#pragma unroll
    for (int j = 0; j < LargeTile::kN; ++j) sums[i][j] = 0;
  }
}

// Computes sums[i][j] = product of rows row(i) and column(j), normalised or minus the center.
template <bool is_centered, typename scalar_t>
__device__ void sum_products(const Rows<scalar_t>& x, int64_t first_row, const Rows<scalar_t>& y,
                             int64_t first_column, float (&sums)[LargeTile::kM][LargeTile::kN]) {
  Slices<scalar_t> slices(x, first_row, y, first_column);
  const float* center = x.center;
  const auto store = [&](float* slice) {
    if constexpr (is_centered) {
      slices.store_less(center, slice);
      center += LargeTile::kDepth;
    } else {
      slices.store(slice);
    }
  };
  float* shared = dynamic_shared<float>();
  clear(sums);
  slices.fetch();
  store(shared);
  __syncthreads();
  for (int current = 0;; current = LargeTile::kSlice - current) {
    const bool is_last = slices.left() == 0;
    if (!is_last) slices.fetch();
    add_slice<ProductTerm>(shared + current, sums);
    if (is_last) break;
    store(shared + LargeTile::kSlice - current);
    __syncthreads();
  }
  __syncthreads();
}

// Computes sums of squared differences, one slice after the other: seldom needed.
template <typename scalar_t>
__device__ void sum_differences(const Rows<scalar_t>& x, int64_t first_row, const Rows<scalar_t>& y,
                                int64_t first_column, float (&sums)[LargeTile::kM][LargeTile::kN]) {
  Slices<scalar_t> slices(x, first_row, y, first_column);
  float* slice = dynamic_shared<float>();
  clear(sums);
  while (slices.left() > 0) {
    slices.fetch();
    slices.store(slice);
    __syncthreads();
    add_slice<DifferenceTerm>(slice, sums);
    __syncthreads();
  }
}

// Sums squared differences of two rows, by a warp; every lane gets the sum.
template <typename scalar_t>
__device__ float squared_difference(const scalar_t* x, const scalar_t* y, int64_t features) {
  float sum = 0;
#pragma unroll 2
  for (int64_t d = threadIdx.x % kWarp; d < features; d += kWarp) {
    sum = DifferenceTerm::add(sum, widen(x[d]), widen(y[d]));
  }
  return warp_sum(sum);
}

// Replaces the flagged sums by sums of squared differences; sum [i][j] is entry e = i kN + j, bit e
// % 32 of flags[e / 32]. A whole warp makes one sum after the other.
template <typename scalar_t>
__device__ void sum_again(const Rows<scalar_t>& x, int64_t first_row, const Rows<scalar_t>& y,
                          int64_t first_column, const unsigned (&flags)[2],
                          float (&sums)[LargeTile::kM][LargeTile::kN]) {
  constexpr int kN = LargeTile::kN, kEntries = LargeTile::kM * kN;
  unsigned left = flags[0], later = flags[1];
  for (int first = 0; __any_sync(kAllLanes, (left | later) != 0); left &= left - 1) {
    unsigned lanes = __ballot_sync(kAllLanes, left != 0);
    if (lanes == 0) {
      left = later, later = 0, first = 32;
      lanes = __ballot_sync(kAllLanes, left != 0);
    }
    const int entry = first + __ffs(static_cast<int>(left)) - 1;
    const int row = LargeTile::row(entry / kN), column = LargeTile::column(entry % kN);
    float own = 0;
    for (; lanes != 0; lanes &= lanes - 1) {
      const int owner = __ffs(static_cast<int>(lanes)) - 1;
      const int64_t r = smaller_of(first_row + __shfl_sync(kAllLanes, row, owner), x.count - 1);
      const int64_t c =
          smaller_of(first_column + __shfl_sync(kAllLanes, column, owner), y.count - 1);
      const float sum =
          squared_difference(x.data + r * x.features, y.data + c * x.features, x.features);
      if (static_cast<int>(threadIdx.x) % kWarp == owner) own = sum;
    }
#pragma unroll
    for (int e = 0; e < kEntries; ++e) {
      if (e == entry && left != 0) sums[e / kN][e % kN] = own;
    }
  }
}

// Squared norms of a tile's rows and then columns. Past the ends stands a number that causes no sum
// to be made again.
template <typename scalar_t>
__device__ void stage_norms(const Rows<scalar_t>& x, int64_t first_row, const Rows<scalar_t>& y,
                            int64_t first_column, float* norms) {
  constexpr float kOutside = std::numeric_limits<float>::max() / 4;
  for (int i = threadIdx.x; i < LargeTile::kRows; i += LargeTile::kThreads) {
    const int64_t r = first_row + i;
    norms[i] = r < x.count ? x.squared_norms[r] : kOutside;
  }
  for (int j = threadIdx.x; j < LargeTile::kColumns; j += LargeTile::kThreads) {
    const int64_t r = first_column + j;
    norms[LargeTile::kRows + j] = r < y.count ? y.squared_norms[r] : kOutside;
  }
}

// Turns sums of products into squared distances, and flags those that lost digits.
__device__ inline void expand(const float* norms, float (&sums)[LargeTile::kM][LargeTile::kN],
                              unsigned (&flags)[2]) {
  constexpr int kM = LargeTile::kM, kN = LargeTile::kN;
  constexpr float kNear = 0.25F;  // two bits lost
  float y_norms[kN];
#pragma unroll
  for (int j = 0; j < kN; ++j) y_norms[j] = norms[LargeTile::kRows + LargeTile::column(j)];
#pragma unroll
  for (int i = 0; i < kM; ++i) {
    const float x_norm = norms[LargeTile::row(i)];
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      const float both = x_norm + y_norms[j], squared = both - 2 * sums[i][j];
      const bool is_sound = squared >= kNear * both && squared <= std::numeric_limits<float>::max();
      if (!is_sound) flags[i / 4] |= 1U << (i % 4 * kN + j);
      sums[i][j] = squared;
    }
  }
}

// Computes squared distances: from products, and from differences if products lose digits. If those
// are many, the whole tile is summed again.
template <typename scalar_t>
__device__ void squared_distances(const Rows<scalar_t>& x, int64_t first_row,
                                  const Rows<scalar_t>& y, int64_t first_column,
                                  float (&sums)[LargeTile::kM][LargeTile::kN]) {
  constexpr int kManyOfLane = LargeTile::kM * LargeTile::kN / 8;
  constexpr int kManyLanes = LargeTile::kThreads / 8;
  float* norms = dynamic_shared<float>() + 2 * LargeTile::kSlice;
  stage_norms(x, first_row, y, first_column, norms);
  sum_products<true>(x, first_row, y, first_column, sums);
  unsigned flags[2] = {};
  expand(norms, sums, flags);
  const bool has_many = __popc(flags[0]) + __popc(flags[1]) > kManyOfLane;
  if (__syncthreads_count(has_many) > kManyLanes) {
    sum_differences(x, first_row, y, first_column, sums);
  } else {
    sum_again(x, first_row, y, first_column, flags, sums);
  }
}

template <typename Term, typename scalar_t>
__device__ void tile_distances(LargeTile, Metric metric, const Rows<scalar_t>& x, int64_t first_row,
                               const Rows<scalar_t>& y, int64_t first_column,
                               float (&distances)[LargeTile::kM][LargeTile::kN]) {
  if constexpr (std::is_same_v<Term, DifferenceTerm>) {
    squared_distances(x, first_row, y, first_column, distances);
  } else {
    sum_products<false>(x, first_row, y, first_column, distances);
  }
  finish_tile<Term>(metric, distances);
}

}  // namespace fastmeta
