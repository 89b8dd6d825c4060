// A block's tile of pairwise sums over features, in registers; the CUDA twin of tile_cpu.h. This is
// the tile for small arrays; large_tile.cuh has the one for large arrays.
//
// The rows of x and y that a tile needs pass through shared memory, kDepth features at a time,
// row-major, a 16-byte access apart from the next multiple of 128 bytes: so the 8 rows that a
// quarter warp reads at once lie in different banks. A lane owns kM x kN sums, its rows kLaneRows
// and its columns kLaneColumns apart. Two instructions a product (subtract, fused multiply-add)
// instead of a matrix product's one buy distances that are exact at any offset.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/ceil_div.h"
#include "common/cuda/copy.cuh"
#include "common/cuda/launch.cuh"
#include "common/cuda/reduce.cuh"
#include "pairwise_distance/operands.h"

namespace fastmeta {

// Rows of x or y: `count` of each task, the first rows of two tasks `task_stride` rows apart.
template <typename scalar_t>
struct Rows {
  const scalar_t* data;
  const acc_t<scalar_t>* inverse_norms;  // [rows] to multiply by, or null
  const acc_t<scalar_t>* squared_norms;  // [rows] of the differences from the center, or null
  const acc_t<scalar_t>* center;         // [features, zeros up to center_stride], or null
  int64_t count;
  int64_t task_stride;
  int64_t features;
  bool wide;  // rows consist of whole, aligned accesses

  __device__ Rows task(int64_t t) const {
    Rows rows = *this;
    rows.data += t * task_stride * features;
    if (inverse_norms != nullptr) rows.inverse_norms += t * task_stride;
    if (squared_norms != nullptr) rows.squared_norms += t * task_stride;
    if (center != nullptr) rows.center += t * center_stride(features);
    return rows;
  }

  // Loads an access of row r from feature d on; zero past the ends.
  template <bool is_wide>
  __device__ Pack<scalar_t, kAccess<scalar_t>> load(int64_t r, int64_t d) const {
    constexpr int n = kAccess<scalar_t>;
    Pack<scalar_t, n> raw{};
    if (r >= count || d >= features) return raw;
    if constexpr (is_wide) {
      raw = as_packs<n>(data)[(r * features + d) / n];
    } else {
#pragma unroll
      for (int i = 0; i < n; ++i) {
        if (d + i < features) raw[i] = data[r * features + d + i];
      }
    }
    return raw;
  }

  __device__ acc_t<scalar_t> inverse_norm(int64_t r) const {
    return inverse_norms == nullptr || r >= count ? acc_t<scalar_t>(1) : inverse_norms[r];
  }
};

// Rows of one operand, from row `first` of all that `data` and `norms` begin with.
template <typename scalar_t>
Rows<scalar_t> rows_from(const PairwiseOperands& operands, int64_t first_task, const void* data,
                         const acc_t<scalar_t>* norms, int64_t first, int64_t count,
                         int64_t task_stride) {
  const int64_t features = operands.shape.features;
  const auto* rows = static_cast<const scalar_t*>(data) + first * features;
  const auto* centers = static_cast<const acc_t<scalar_t>*>(operands.centers);
  if (norms != nullptr) norms += first;
  if (centers != nullptr) centers += first_task * center_stride(features);
  return {.data = rows,
          .inverse_norms = operands.metric == Metric::kCosine ? norms : nullptr,
          .squared_norms = operands.metric == Metric::kCosine ? nullptr : norms,
          .center = centers,
          .count = count,
          .task_stride = task_stride,
          .features = features,
          .wide = has_wide_rows(rows, features, features)};
}

template <typename scalar_t>
Rows<scalar_t> x_rows(const PairwiseOperands& operands, const Chunk& chunk) {
  const int64_t queries = operands.shape.queries;
  const auto* norms = static_cast<const acc_t<scalar_t>*>(operands.norms);
  return rows_from<scalar_t>(operands, chunk.first_task, operands.x, norms,
                             chunk.first_task * queries + chunk.first_row, chunk.rows, queries);
}

template <typename scalar_t>
Rows<scalar_t> y_rows(const PairwiseOperands& operands, const Chunk& chunk) {
  const auto& shape = operands.shape;
  const auto* norms = static_cast<const acc_t<scalar_t>*>(operands.norms);
  if (norms != nullptr) norms += shape.tasks * shape.queries;
  return rows_from<scalar_t>(operands, chunk.first_task, operands.y, norms,
                             chunk.first_task * shape.classes, shape.classes, shape.classes);
}

// Copies kFeatures features of kCount rows into shared memory, kStride values a row. All loads of a
// thread are under way before it stores the first.
template <bool is_wide, int kCount, int kFeatures, int kStride, int kThreads, typename scalar_t>
__device__ void stage_accesses(const Rows<scalar_t>& rows, int64_t first_row, int64_t first_feature,
                               acc_t<scalar_t>* tile) {
  constexpr int n = kAccess<scalar_t>, kLanes = kFeatures / n, kStep = kThreads / kLanes;
  static_assert(kFeatures % n == 0 && kThreads % kLanes == 0 && kCount % kStep == 0);
  constexpr int kPart = kAccess<acc_t<scalar_t>>;  // of a widened pack, for one store
  const int row = threadIdx.x / kLanes, feature = threadIdx.x % kLanes * n;
  Pack<scalar_t, n> raw[kCount / kStep];
#pragma unroll
  for (int i = 0; i < kCount / kStep; ++i) {
    raw[i] = rows.template load<is_wide>(first_row + row + i * kStep, first_feature + feature);
  }
#pragma unroll
  for (int i = 0; i < kCount / kStep; ++i) {
    const auto scale = rows.inverse_norm(first_row + row + i * kStep);
    const int target = ((row + i * kStep) * kStride + feature) / kPart;
#pragma unroll
    for (int part = 0; part < n / kPart; ++part) {
      Pack<acc_t<scalar_t>, kPart> wide;
#pragma unroll
      for (int k = 0; k < kPart; ++k) wide[k] = widen(raw[i][part * kPart + k]) * scale;
      as_packs<kPart>(tile)[target + part] = wide;
    }
  }
}

template <int kCount, int kFeatures, int kStride, int kThreads, typename scalar_t>
__device__ void stage(const Rows<scalar_t>& rows, int64_t first_row, int64_t first_feature,
                      acc_t<scalar_t>* tile) {
  if (rows.wide) {
    stage_accesses<true, kCount, kFeatures, kStride, kThreads>(rows, first_row, first_feature,
                                                               tile);
  } else {
    stage_accesses<false, kCount, kFeatures, kStride, kThreads>(rows, first_row, first_feature,
                                                                tile);
  }
}

// 16 x 64 sums: 2 x 4 a lane, 4 x 8 lanes a warp, 2 x 2 warps.
struct SmallTile {
  static constexpr int kM = 2, kN = 4;
  static constexpr int kLaneRows = 4, kLaneColumns = 8, kLaneColumnStep = 1;
  static constexpr int kWarpRows = 2, kWarpColumns = 2, kDepthAccesses = 16;
  static constexpr int kRows = kLaneRows * kM * kWarpRows;
  static constexpr int kColumns = kLaneColumns * kN * kWarpColumns;
  static constexpr int kThreads = kWarp * kWarpRows * kWarpColumns;
  static constexpr int kBlocks = 512 / kThreads;  // a multiprocessor's, at 128 registers a thread
  static constexpr int kSharedBytes = (kRows + kColumns) * (kDepthAccesses + 1) * kAccessBytes;

  template <typename value_t>
  static constexpr int kDepth = kDepthAccesses * kAccess<value_t>;

  // Row in the tile of this lane's distances [i][..], and column of its distances [..][j].
  static __device__ int row(int i) {
    const int warp = threadIdx.x / kWarp / kWarpColumns, lane = threadIdx.x % kWarp;
    return warp * kLaneRows * kM + lane / kLaneColumns + kLaneRows * i;
  }
  static __device__ int column(int j) {
    const int lane = threadIdx.x % kWarp;
    return warp_column() * kLaneColumns * kN + lane % kLaneColumns + kLaneColumns * j;
  }
  static __device__ int warp_column() { return threadIdx.x / kWarp % kWarpColumns; }
  static __device__ bool is_first_lane_of_row() { return threadIdx.x % kLaneColumns == 0; }
};

template <typename Tile>
FASTMETA_HOST_DEVICE constexpr int64_t tiles_across(int64_t columns) {
  return ceil_div(columns, Tile::kColumns);
}

// Tiles of a [tasks, rows, columns] array.
template <typename Tile>
constexpr int64_t count_tiles(int64_t tasks, int64_t rows, int64_t columns) {
  return tasks * ceil_div(rows, Tile::kRows) * tiles_across<Tile>(columns);
}

struct TilePosition {
  int64_t task, row, column;
};

__device__ inline int at_most(int limit, int64_t x) {
  return x < limit ? static_cast<int>(x) : limit;
}

// Finds tile number `tile` of such an array, counted along rows of tiles.
template <typename Tile>
__device__ TilePosition tile_position(int64_t tile, int64_t rows, int64_t columns) {
  const int64_t across = tiles_across<Tile>(columns), down = ceil_div(rows, Tile::kRows);
  const int64_t row_of_tiles = tile / across;
  return {row_of_tiles / down, row_of_tiles % down * Tile::kRows, tile % across * Tile::kColumns};
}

// Calls body(DifferenceTerm{}) or body(ProductTerm{}).
template <typename Body>
cudaError_t with_term(Metric metric, const Body& body) {
  return is_difference(metric) ? body(DifferenceTerm{}) : body(ProductTerm{});
}

template <Metric metric, typename value_t, int m, int n>
__device__ void finish_all(value_t (&sums)[m][n]) {
#pragma unroll
  for (int i = 0; i < m; ++i) {
#pragma unroll
    for (int j = 0; j < n; ++j) sums[i][j] = finish(metric, sums[i][j]);
  }
}

// Calls finish() on all sums, with one branch on the metric for all of them.
template <typename Term, typename value_t, int m, int n>
__device__ void finish_tile(Metric metric, value_t (&sums)[m][n]) {
  if constexpr (std::is_same_v<Term, DifferenceTerm>) {
    if (metric == Metric::kEuclidean) finish_all<Metric::kEuclidean>(sums);
  } else {
    metric == Metric::kCosine ? finish_all<Metric::kCosine>(sums) : finish_all<Metric::kDot>(sums);
  }
}

// Computes distances[i][j] = distance of rows row(i) and column(j) of the tile at (first_row,
// first_column). Called by the whole block; uses its dynamic shared memory, free again on return.
template <typename Term, typename scalar_t>
__device__ void tile_distances(SmallTile, Metric metric, const Rows<scalar_t>& x, int64_t first_row,
                               const Rows<scalar_t>& y, int64_t first_column,
                               acc_t<scalar_t> (&distances)[SmallTile::kM][SmallTile::kN]) {
  using Tile = SmallTile;
  using value_t = acc_t<scalar_t>;
  constexpr int n = kAccess<value_t>, kDepth = Tile::template kDepth<value_t>;
  constexpr int kStride = kDepth + n;
  value_t* x_tile = dynamic_shared<value_t>();
  value_t* y_tile = x_tile + Tile::kRows * kStride;
#pragma unroll
  for (int i = 0; i < Tile::kM; ++i) {
#pragma unroll
    for (int j = 0; j < Tile::kN; ++j) distances[i][j] = 0;
  }
  for (int64_t first = 0; first < x.features; first += kDepth) {
    stage<Tile::kRows, kDepth, kStride, Tile::kThreads>(x, first_row, first, x_tile);
    stage<Tile::kColumns, kDepth, kStride, Tile::kThreads>(y, first_column, first, y_tile);
    __syncthreads();
#pragma unroll 1
    for (int d = 0; d < kDepth; d += n) {
      Pack<value_t, n> x_pack[Tile::kM];
#pragma unroll
      for (int i = 0; i < Tile::kM; ++i) {
        x_pack[i] = as_packs<n>(x_tile)[(Tile::row(i) * kStride + d) / n];
      }
#pragma unroll
      for (int j = 0; j < Tile::kN; ++j) {
        const auto y_pack = as_packs<n>(y_tile)[(Tile::column(j) * kStride + d) / n];
#pragma unroll
        for (int i = 0; i < Tile::kM; ++i) {
#pragma unroll
          for (int k = 0; k < n; ++k) {
            distances[i][j] = Term::add(distances[i][j], x_pack[i][k], y_pack[k]);
          }
        }
      }
    }
    __syncthreads();
  }
  finish_tile<Term>(metric, distances);
}

}  // namespace fastmeta
