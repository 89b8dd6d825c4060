#include <algorithm>
#include <type_traits>

#include "common/cuda/workspace.h"
#include "pairwise_distance/gradient.h"
#include "pairwise_distance/large_tile.cuh"

#ifndef FASTMETA_CHUNK
#define FASTMETA_CHUNK (1 << 26)  // numbers in the largest array of a chunk: 256 MiB of float
#endif

namespace fastmeta {
namespace {

constexpr int kRowThreads = 256;  // for kernels in which a warp owns a row
constexpr int kRowsPerBlock = kRowThreads / kWarp;

// Sizes of a tile: kM x kN neighbouring sums a lane, kWarpRows x kWarpColumns warps of 4 x 8 lanes.
template <int kM_, int kN_, int kWarpRows, int kWarpColumns, int kDepthAccesses>
struct GradientTile {
  static constexpr int kM = kM_, kN = kN_, kLaneRows = 4, kLaneColumns = 8;
  static constexpr int kRows = kLaneRows * kM * kWarpRows;
  static constexpr int kColumns = kLaneColumns * kN * kWarpColumns;
  // A pad of kM keeps packs aligned and spreads columns of W over banks.
  static constexpr int kWeightStride = kRows + kM;
  static_assert(kWeightStride % kM == 0 && kColumns % kN == 0);  // for reads of whole packs
  static constexpr int kThreads = kWarp * kWarpRows * kWarpColumns;
  static constexpr int kBlocks = 512 / kThreads;  // a multiprocessor's, at 128 registers a thread

  template <typename value_t>
  static constexpr int kDepth = kDepthAccesses * kAccess<value_t>;
  template <typename value_t>
  static constexpr int kSharedBytes =
      kDepth<value_t> * (kWeightStride + kColumns) * sizeof(value_t);

  // Tile row and column of this lane's first sum.
  static __device__ int row() {
    const int warp = threadIdx.x / kWarp / kWarpColumns, lane = threadIdx.x % kWarp;
    return (warp * kLaneRows + lane / kLaneColumns) * kM;
  }
  static __device__ int column() {
    const int warp = threadIdx.x / kWarp % kWarpColumns, lane = threadIdx.x % kWarp;
    return (warp * kLaneColumns + lane % kLaneColumns) * kN;
  }
};

using LargeGradientTile = GradientTile<4, 4, 4, 2, 8>;   // 64 x 64
using SmallGradientTile = GradientTile<4, 2, 1, 4, 16>;  // 16 x 64

// Gradient of one operand: its own rows, the other's rows to sum over, and the layout of a task's W
// for them. The sums are made in `splits` parts.
template <typename scalar_t>
struct Side {
  Rows<scalar_t> own, other;
  int64_t weight_own_stride, weight_other_stride;
  int64_t splits;
  bool accumulate;        // onto the sums of an earlier chunk
  acc_t<scalar_t>* sums;  // [splits, tasks, own.count, features] for finish_kernel, or null:
  scalar_t* grad;         // straight to the gradient, rows as far apart as own's
};

// Copies W of kRows own rows and kDepth other rows into shared memory, kWeightStride numbers for
// each other row, zero past `rows` and `depth`; kRowStep x kDepthStep numbers by the block at once.
template <typename Tile, int kRowStep, int kDepthStep, typename value_t>
__device__ void stage_weights_in_steps(const value_t* weights, int64_t own_stride,
                                       int64_t other_stride, int first_row, int first_depth,
                                       int rows, int depth, value_t* tile) {
  constexpr int kDepth = Tile::template kDepth<value_t>;
  static_assert(kRowStep * kDepthStep == Tile::kThreads);
  static_assert(Tile::kRows % kRowStep == 0 && kDepth % kDepthStep == 0);
  weights += first_row * own_stride + first_depth * other_stride;
#pragma unroll
  for (int r = 0; r < Tile::kRows; r += kRowStep) {
#pragma unroll
    for (int k = 0; k < kDepth; k += kDepthStep) {
      // Zero weights past the ends add nothing, so the sum needs no bounds.
      const bool inside = first_row + r < rows && first_depth + k < depth;
      tile[(first_depth + k) * Tile::kWeightStride + first_row + r] =
          inside ? weights[r * own_stride + k * other_stride] : value_t(0);
    }
  }
}

// Copies W for either side. Neighbouring lanes read neighbouring numbers if own rows are, else 8
// neighbours in each of 4 rows; both ways they write to 32 banks.
template <typename Tile, typename value_t>
__device__ void stage_weights(const value_t* weights, int64_t own_stride, int64_t other_stride,
                              int rows, int depth, value_t* tile) {
  constexpr int kDepth = Tile::template kDepth<value_t>, kWarps = Tile::kThreads / kWarp;
  if (own_stride == 1) {
    const int row = threadIdx.x % Tile::kRows, other = threadIdx.x / Tile::kRows;
    stage_weights_in_steps<Tile, Tile::kRows, Tile::kThreads / Tile::kRows>(
        weights, own_stride, other_stride, row, other, rows, depth, tile);
  } else {
    constexpr int kWarpsDeep = kWarps < kDepth / 8 ? kWarps : kDepth / 8;
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int row = warp / kWarpsDeep * 4 + lane / 8, other = warp % kWarpsDeep * 8 + lane % 8;
    stage_weights_in_steps<Tile, kWarps / kWarpsDeep * 4, kWarpsDeep * 8>(
        weights, own_stride, other_stride, row, other, rows, depth, tile);
  }
}

template <typename scalar_t>
__device__ void add_to(scalar_t& target, acc_t<scalar_t> value, bool accumulate) {
  target = narrow<scalar_t>(accumulate ? widen(target) + value : value);
}

// sums[r, d] (+)= sum_k W[r, k] (other[k, d] - own[r, d]), for products sum_k W[r, k] other[k, d].
// own [T, R, D], other [T, K, D], W [T, R, K] or its transpose; both sides in one launch.
// A block owns a tile of R x D, a lane kM x kN sums and, for differences, the kM x kN own values;
// tiles of W and other pass through shared memory in the order of k. acc_t arithmetic.
template <typename scalar_t, typename Term, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    weighted_sums_kernel(Side<scalar_t> x, Side<scalar_t> y, int64_t x_tiles, int64_t tasks,
                         const acc_t<scalar_t>* weights) {
  using value_t = acc_t<scalar_t>;
  constexpr int kM = Tile::kM, kN = Tile::kN, kDepth = Tile::template kDepth<value_t>;
  constexpr int kStride = Tile::kWeightStride;
  constexpr bool kDifference = std::is_same_v<Term, DifferenceTerm>;
  value_t* weight_tile = dynamic_shared<value_t>();
  value_t* other_tile = weight_tile + kDepth * kStride;

  // Both sides share a launch: neither may have enough tiles to fill the device.
  const bool is_x = blockIdx.x < x_tiles;
  const Side<scalar_t> side = is_x ? x : y;
  const int64_t features = side.own.features;
  const auto position =
      tile_position<Tile>(is_x ? blockIdx.x : blockIdx.x - x_tiles, side.own.count, features);
  // Splits count as further tasks.
  const int64_t task = position.task % tasks, split = position.task / tasks;
  const auto own_rows = side.own.task(task), other_rows = side.other.task(task);
  weights += task * x.own.count * y.own.count;
  const int64_t row = position.row + Tile::row(), column = position.column + Tile::column();
  const auto is_inside = [&](int i, int j) {
    return row + i < own_rows.count && column + j < features;
  };

  // Own values stay in registers: the difference is formed before the product, which keeps its
  // digits.
  value_t own[kM][kN] = {}, sums[kM][kN] = {};
  if constexpr (kDifference) {
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        if (is_inside(i, j)) own[i][j] = widen(own_rows.data[(row + i) * features + column + j]);
      }
    }
  }
  const int rows = at_most(Tile::kRows, own_rows.count - position.row);
  const int64_t part = ceil_div(other_rows.count, side.splits);
  const int64_t end = (split + 1) * part < other_rows.count ? (split + 1) * part : other_rows.count;
  weights += position.row * side.weight_own_stride;
  for (int64_t first = split * part; first < end; first += kDepth) {
    const int depth = at_most(kDepth, end - first);
    stage_weights<Tile>(weights + first * side.weight_other_stride, side.weight_own_stride,
                        side.weight_other_stride, rows, depth, weight_tile);
    stage<kDepth, Tile::kColumns, Tile::kColumns, Tile::kThreads>(other_rows, first,
                                                                  position.column, other_tile);
    __syncthreads();
#pragma unroll 4
    for (int k = 0; k < depth; ++k) {
      const auto weight = as_packs<kM>(weight_tile)[(k * kStride + Tile::row()) / kM];
      const auto other = as_packs<kN>(other_tile)[(k * Tile::kColumns + Tile::column()) / kN];
#pragma unroll
      for (int i = 0; i < kM; ++i) {
#pragma unroll
        for (int j = 0; j < kN; ++j) {
          // The order of k is fixed, so the bits are too.
          sums[i][j] += weight[i] * (kDifference ? other[j] - own[i][j] : other[j]);
        }
      }
    }
    __syncthreads();
  }
  // Without a workspace the sum is the gradient itself.
  const bool finished = side.sums == nullptr;
  // A chunk's rows lie densely in the workspace; the gradient's tasks are all rows apart.
  const int64_t first_row = finished ? task * side.own.task_stride : position.task * own_rows.count;
#pragma unroll
  for (int i = 0; i < kM; ++i) {
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      if (!is_inside(i, j)) continue;
      const int64_t target = (first_row + row + i) * features + column + j;
      if (finished) {
        add_to(side.grad[target], sums[i][j], side.accumulate);
      } else {
        add_to(side.sums[target], sums[i][j], side.accumulate);
      }
    }
  }
}

// grad[r] = s = sum of sums[.., r] over splits; for cosine, with a = own[r] / |own[r]|,
// (s - a (a.s)) / |own[r]|, or s / eps where |own[r]| <= eps. A warp owns a row of x or y. acc_t.
template <typename scalar_t>
__global__ void __launch_bounds__(kRowThreads)
    finish_kernel(bool is_cosine, Side<scalar_t> x, Side<scalar_t> y, int64_t x_rows,
                  int64_t y_rows) {
  using value_t = acc_t<scalar_t>;
  const int64_t owned = int64_t(blockIdx.x) * kRowsPerBlock + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (owned >= x_rows + y_rows) return;
  const bool is_x = owned < x_rows;
  const Side<scalar_t> side = is_x ? x : y;
  const int64_t all_rows = is_x ? x_rows : y_rows, row = is_x ? owned : owned - x_rows;
  const auto own = side.own.task(row / side.own.count);
  const int64_t r = row % own.count, features = own.features;
  const auto sum = [&](int64_t d) {
    value_t total = 0;
    for (int64_t s = 0; s < side.splits; ++s) {
      total += side.sums[(s * all_rows + row) * features + d];
    }
    return total;
  };
  const auto normalized = [&](int64_t d) {
    return widen(own.data[r * features + d]) * own.inverse_norm(r);
  };
  value_t along = 0;
  // A clamped norm is constant: its row has no component to project out.
  if (is_cosine && own.inverse_norm(r) < value_t(1 / kCosineEps)) {
    for (int64_t d = lane; d < features; d += kWarp) along += normalized(d) * sum(d);
    along = warp_sum(along);
  }
  scalar_t* grad = side.grad + (row / own.count * own.task_stride + r) * features;
  for (int64_t d = lane; d < features; d += kWarp) {
    value_t value = sum(d);
    if (is_cosine) value = own.inverse_norm(r) * (value - along * normalized(d));
    grad[d] = narrow<scalar_t>(value);
  }
}

// Plan: how much of the work is done at a time.
struct Plan {
  int64_t tasks, rows;  // of a chunk
  int64_t splits;       // parts of the sums over rows of x, where y has too few tiles
};

Plan plan_of(const PairwiseShape& shape) {
  constexpr int64_t kSplitRows = 512;
  const int64_t most = FASTMETA_CHUNK;
  using Tile = LargeGradientTile;
  const int64_t row = std::max({shape.classes, shape.features, int64_t(1)});
  // A chunk has whole rows of tiles: a tile decides for all its distances how they are summed.
  const int64_t rows_of_tiles = std::max<int64_t>(most / row / LargeTile::kRows, 1);
  Plan plan{1, std::min(shape.queries, rows_of_tiles * LargeTile::kRows), 1};
  // A chunk has several tasks only if it has all their rows.
  if (plan.rows == shape.queries) {
    plan.tasks = std::clamp<int64_t>(most / (row * shape.queries), 1, shape.tasks);
  }
  const int64_t tiles = count_tiles<Tile>(plan.tasks, shape.classes, shape.features);
  plan.splits = std::max<int64_t>(
      1, std::min(2 * multiprocessors() / std::max<int64_t>(1, tiles), plan.rows / kSplitRows));
  return plan;
}

// Computes the gradient of both operands, chunk after chunk. Sums that need no finish go straight
// to the gradients; others (cosine, split ones, half's over several chunks) to the workspace.
template <typename scalar_t>
class PairwiseGradient {
  using value_t = acc_t<scalar_t>;

 public:
  PairwiseGradient(const PairwiseOperands& operands, void* grad_x, void* grad_y, void* workspace)
      : operands_(operands),
        shape_(operands.shape),
        plan_(plan_of(operands.shape)),
        is_cosine_(operands.metric == Metric::kCosine),
        grad_x_(static_cast<scalar_t*>(grad_x)),
        grad_y_(static_cast<scalar_t*>(grad_y)),
        space_(workspace) {
    constexpr bool is_reduced = !std::is_same_v<scalar_t, value_t>;
    const bool has_chunks_of_rows = plan_.rows < shape_.queries;
    weights_ = space_.take<value_t>(plan_.tasks * plan_.rows * shape_.classes);
    if (is_cosine_) {
      x_sums_ = space_.take<value_t>(plan_.tasks * plan_.rows * shape_.features);
    }
    // Half types cannot accumulate over chunks in the gradient itself without rounding each time.
    if (is_cosine_ || plan_.splits > 1 || (is_reduced && has_chunks_of_rows)) {
      y_sums_ = space_.take<value_t>(plan_.splits * plan_.tasks * shape_.classes * shape_.features);
    }
  }

  int64_t workspace_bytes() const { return space_.bytes(); }

  int run(const Weigh& weigh, cudaStream_t stream) const {
    for (int64_t t = 0; t < shape_.tasks; t += plan_.tasks) {
      for (int64_t r = 0; r < shape_.queries; r += plan_.rows) {
        const Chunk chunk{t, std::min(plan_.tasks, shape_.tasks - t), r,
                          std::min(plan_.rows, shape_.queries - r)};
        int error = weigh(chunk, weights_);
        if (error == cudaSuccess) error = add(chunk, stream);
        if (error != cudaSuccess) return error;
      }
    }
    return cudaSuccess;
  }

 private:
  cudaError_t add(const Chunk& chunk, cudaStream_t stream) const {
    const auto x_own = x_rows<scalar_t>(operands_, chunk);
    const auto y_own = y_rows<scalar_t>(operands_, chunk);
    const int64_t first_x = chunk.first_task * shape_.queries + chunk.first_row;
    const int64_t first_y = chunk.first_task * shape_.classes;
    const Side<scalar_t> x{.own = x_own,
                           .other = y_own,
                           .weight_own_stride = shape_.classes,
                           .weight_other_stride = 1,
                           .splits = 1,
                           .accumulate = false,
                           .sums = x_sums_,
                           .grad = grad_x_ + first_x * shape_.features};
    const Side<scalar_t> y{.own = y_own,
                           .other = x_own,
                           .weight_own_stride = 1,
                           .weight_other_stride = shape_.classes,
                           .splits = plan_.splits,
                           .accumulate = chunk.first_row > 0,
                           .sums = y_sums_,
                           .grad = grad_y_ + first_y * shape_.features};
    const cudaError_t error = add_weighted_sums(x, y, chunk.tasks, stream);
    if (error != cudaSuccess) return error;
    const bool is_last = chunk.first_row + chunk.rows == shape_.queries;
    const int64_t x_rows = x_sums_ == nullptr ? 0 : chunk.tasks * chunk.rows;
    // Sums of y run over all rows of x: they are complete with the last chunk.
    const int64_t y_rows = y_sums_ == nullptr || !is_last ? 0 : chunk.tasks * shape_.classes;
    return launch(finish_kernel<scalar_t>, ceil_div(x_rows + y_rows, kRowsPerBlock), kRowThreads, 0,
                  stream, is_cosine_, x, y, x_rows, y_rows);
  }

  cudaError_t add_weighted_sums(const Side<scalar_t>& x, const Side<scalar_t>& y, int64_t tasks,
                                cudaStream_t stream) const {
    const auto with = [&](auto term, auto tile) {
      using Tile = decltype(tile);
      const int64_t x_tiles = count_tiles<Tile>(tasks, x.own.count, shape_.features);
      const int64_t y_tiles = count_tiles<Tile>(tasks * plan_.splits, y.own.count, shape_.features);
      return launch(weighted_sums_kernel<scalar_t, decltype(term), Tile>, x_tiles + y_tiles,
                    Tile::kThreads, Tile::template kSharedBytes<value_t>, stream, x, y, x_tiles,
                    tasks, weights_);
    };
    const int64_t large_tiles =
        count_tiles<LargeGradientTile>(tasks, x.own.count, shape_.features) +
        count_tiles<LargeGradientTile>(tasks * plan_.splits, y.own.count, shape_.features);
    return with_term(operands_.metric, [&](auto term) {
      // A large tile of double does not fit into the registers.
      if constexpr (!std::is_same_v<scalar_t, double>) {
        if (large_tiles >= multiprocessors()) return with(term, LargeGradientTile{});
      }
      return with(term, SmallGradientTile{});
    });
  }

  const PairwiseOperands operands_;
  const PairwiseShape shape_;
  const Plan plan_;
  const bool is_cosine_;
  scalar_t* const grad_x_;
  scalar_t* const grad_y_;
  Workspace space_;
  value_t* weights_ = nullptr;
  value_t* x_sums_ = nullptr;
  value_t* y_sums_ = nullptr;
};

}  // namespace

int64_t pairwise_gradient_workspace(const PairwiseOperands& operands) {
  return with_dtype(operands.dtype, [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    return PairwiseGradient<scalar_t>(operands, nullptr, nullptr, nullptr).workspace_bytes();
  });
}

int launch_pairwise_gradient(const PairwiseOperands& operands, const Weigh& weigh, void* grad_x,
                             void* grad_y, void* workspace, void* stream) {
  return with_dtype(operands.dtype, [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    return PairwiseGradient<scalar_t>(operands, grad_x, grad_y, workspace)
        .run(weigh, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace fastmeta
