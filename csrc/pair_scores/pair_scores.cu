#include "common/ceil_div.h"
#include "common/cuda/launch.cuh"
#include "common/cuda/reduce.cuh"
#include "common/cuda/scalar.cuh"
#include "common/cuda/workspace.h"
#include "pair_scores/pair_scores.h"

namespace fastmeta {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kBlocks = 512 / kThreads;  // a multiprocessor's, at 128 registers a thread

template <typename scalar_t>
__device__ acc_t<scalar_t> load(const scalar_t* row, int64_t place, bool is_there) {
  return is_there ? widen(row[place]) : acc_t<scalar_t>(0);
}

// Rows of one operand, and of its tangent, of a task: features `features`, `count` rows.
template <typename scalar_t>
struct PairRows {
  const scalar_t *values, *tangents;
  int64_t count, features;

  __device__ PairRows task(int64_t t) const {
    PairRows rows = *this;
    rows.values += t * count * features;
    if (tangents != nullptr) rows.tangents += t * count * features;
    return rows;
  }
};

template <typename scalar_t>
PairRows<scalar_t> x_rows(const PairScoresOperands& o) {
  return {static_cast<const scalar_t*>(o.x), static_cast<const scalar_t*>(o.x_dot), o.shape.queries,
          o.shape.features};
}
template <typename scalar_t>
PairRows<scalar_t> y_rows(const PairScoresOperands& o) {
  return {static_cast<const scalar_t*>(o.y), static_cast<const scalar_t*>(o.y_dot), o.shape.classes,
          o.shape.features};
}

// A block's pairs: kRows x kColumns, 2 x 2 a thread, kDepth features at a time in shared memory. A
// row is kStride numbers apart from the next, so that the 16 rows that a warp reads at once lie in
// different banks.
constexpr int kColumnThreads = 16, kRowThreads = kThreads / kColumnThreads;
constexpr int kRows = 2 * kRowThreads, kColumns = 2 * kColumnThreads;
constexpr int kDepth = 32, kStride = kDepth + 1;

template <int count, typename scalar_t>
__device__ void stage(const scalar_t* rows, int64_t of_all, int64_t features, int64_t first_row,
                      int64_t first_feature, acc_t<scalar_t>* tile) {
  const int lane = threadIdx.x % kDepth;
  const bool has_feature = first_feature + lane < features;
  for (int r = threadIdx.x / kDepth; r < count; r += kThreads / kDepth) {
    const bool is_there = has_feature && first_row + r < of_all;
    tile[r * kStride + lane] =
        load(rows, (first_row + r) * features + first_feature + lane, is_there);
  }
}

// sums[t, q, n] = bias[t] + sum_h Term(x[t, q, h] + y[t, n, h]); [T, Q, H], [T, N, H] -> [T, Q, N].
// A block owns kRows x kColumns pairs of a task; acc_t sums in registers, in the order of h.
template <typename Term, typename scalar_t>
__global__ void __launch_bounds__(kThreads, kBlocks)
    pair_sums_kernel(PairRows<scalar_t> x, PairRows<scalar_t> y, const acc_t<scalar_t>* weight,
                     const acc_t<scalar_t>* weight_dot, const acc_t<scalar_t>* bias,
                     scalar_t* sums) {
  using value_t = acc_t<scalar_t>;
  constexpr bool kHasDirection = Term::kHasDirection;
  constexpr int kTiles = kHasDirection ? 2 : 1;
  __shared__ value_t x_tile[kTiles][kRows * kStride], y_tile[kTiles][kColumns * kStride];
  __shared__ value_t weights[kTiles][kDepth];
  // Fewer than the blocks, so 32 bits do: 64-bit divisions are calls that spill.
  const auto across = static_cast<unsigned>(ceil_div(y.count, int64_t(kColumns)));
  const auto down = static_cast<unsigned>(ceil_div(x.count, int64_t(kRows)));
  const int64_t t = blockIdx.x / across / down;
  const int64_t first_row = int64_t(blockIdx.x / across % down) * kRows;
  const int64_t first_column = int64_t(blockIdx.x % across) * kColumns;
  const int row = threadIdx.x / kColumnThreads, column = threadIdx.x % kColumnThreads;
  const int64_t features = x.features;
  x = x.task(t);
  y = y.task(t);
  value_t sum[2][2] = {};
  for (int64_t first = 0; first < features; first += kDepth) {
    stage<kRows>(x.values, x.count, features, first_row, first, x_tile[0]);
    stage<kColumns>(y.values, y.count, features, first_column, first, y_tile[0]);
    if (threadIdx.x < kDepth) {
      const int64_t place = t * features + first + threadIdx.x;
      const bool is_there = first + threadIdx.x < features;
      weights[0][threadIdx.x] = load(weight, place, is_there);
      if constexpr (kHasDirection) weights[1][threadIdx.x] = load(weight_dot, place, is_there);
    }
    if constexpr (kHasDirection) {
      stage<kRows>(x.tangents, x.count, features, first_row, first, x_tile[1]);
      stage<kColumns>(y.tangents, y.count, features, first_column, first, y_tile[1]);
    }
    __syncthreads();
    // What lies past the features has a weight of 0, but need not have a value of 0.
    const int depth = features - first < kDepth ? static_cast<int>(features - first) : kDepth;
#pragma unroll 4
    for (int d = 0; d < depth; ++d) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int of_x = (row + i * kRowThreads) * kStride + d;
          const int of_y = (column + j * kColumnThreads) * kStride + d;
          value_t u_dot = 0, dot = 0;
          if constexpr (kHasDirection) {
            u_dot = x_tile[1][of_x] + y_tile[1][of_y];
            dot = weights[1][d];
          }
          sum[i][j] += Term::of(x_tile[0][of_x] + y_tile[0][of_y], u_dot, weights[0][d], dot);
        }
      }
    }
    __syncthreads();
  }
  sums += t * x.count * y.count;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int64_t q = first_row + row + i * kRowThreads;
      const int64_t n = first_column + column + j * kColumnThreads;
      if (q < x.count && n < y.count) sums[q * y.count + n] = narrow<scalar_t>(bias[t] + sum[i][j]);
    }
  }
}

// A side of the gradient: its own rows and those it sums over, in `parts` parts. An upstream number
// is own_stride and other_stride apart from the next row's.
template <typename scalar_t>
struct Side {
  PairRows<scalar_t> own, other;
  int64_t own_stride, other_stride;
  int64_t parts;
  acc_t<scalar_t>* sums;     // [parts, tasks, own.count, features]
  acc_t<scalar_t>* weights;  // [tasks, parts, row blocks, features], or null
};

constexpr int kOwnRows = 2;                         // of a thread
constexpr int kBlockRows = kOwnRows * kWarps;       // of a block
constexpr int64_t kPartRows = 64, kMostParts = 16;  // to sum over, at least; parts
constexpr int64_t kWantedBlocks = 512;              // to fill a large GPU

int64_t row_blocks(int64_t rows) { return ceil_div(rows, kBlockRows); }
int64_t feature_blocks(int64_t features) { return ceil_div(features, kWarp); }

// Parts of the sums over `other` rows. They depend on the shape only, so the bits do.
int64_t parts_of(const PairScoresShape& s, int64_t own, int64_t other) {
  const int64_t blocks = s.tasks * row_blocks(own) * feature_blocks(s.features);
  const int64_t wanted = ceil_div(kWantedBlocks, blocks > 0 ? blocks : 1);
  const int64_t most = other / kPartRows < kMostParts ? other / kPartRows : kMostParts;
  return wanted < most ? wanted : (most > 1 ? most : 1);
}

// sums[part, t, r, h] = sum over a part of the other rows of the share of the pairs (r, k), and
// weights[t, part, block, h] = the sum of their shares of the weight. Both sides in one launch.
// A lane owns a feature, a warp kOwnRows rows of a side; acc_t sums in the order of k.
template <typename Share, typename scalar_t>
__global__ void __launch_bounds__(kThreads, kBlocks)
    pair_gradient_kernel(PairScoresShape s, Side<scalar_t> x, Side<scalar_t> y, int64_t x_blocks,
                         const scalar_t* grad_scores, const acc_t<scalar_t>* weight,
                         const acc_t<scalar_t>* weight_dot) {
  using value_t = acc_t<scalar_t>;
  constexpr bool kHasDirection = Share::kHasDirection;
  __shared__ value_t of_warps[kWarps][kWarp];
  const bool is_x = blockIdx.x < x_blocks;
  const Side<scalar_t> side = is_x ? x : y;
  const int64_t features = s.features;
  // Fewer than the blocks, so 32 bits do.
  const auto across = static_cast<unsigned>(ceil_div(features, int64_t(kWarp)));
  const auto down = static_cast<unsigned>(ceil_div(side.own.count, int64_t(kBlockRows)));
  const auto tasks = static_cast<unsigned>(s.tasks);
  unsigned rest = is_x ? blockIdx.x : blockIdx.x - static_cast<unsigned>(x_blocks);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t feature = int64_t(rest % across) * kWarp + lane;
  rest /= across;
  const int64_t row_block = rest % down, row = row_block * kBlockRows + int64_t(warp) * kOwnRows;
  rest /= down;
  const int64_t t = rest % tasks, part = rest / tasks;
  const bool has_feature = feature < features;
  const auto own = side.own.task(t), other = side.other.task(t);

  value_t at_own[kOwnRows] = {}, along_own[kOwnRows] = {}, sums[kOwnRows] = {}, of_weight = 0;
#pragma unroll
  for (int i = 0; i < kOwnRows; ++i) {
    const bool is_there = has_feature && row + i < own.count;
    at_own[i] = load(own.values, (row + i) * features + feature, is_there);
    if constexpr (kHasDirection) {
      along_own[i] = load(own.tangents, (row + i) * features + feature, is_there);
    }
  }
  value_t w = 0, w_dot = 0;
  if constexpr (kHasDirection) {
    w = load(weight, t * features + feature, has_feature);
    w_dot = load(weight_dot, t * features + feature, has_feature);
  }
  const int64_t begin = other.count * part / side.parts,
                end = other.count * (part + 1) / side.parts;
  const scalar_t* g = grad_scores + t * s.queries * s.classes + row * side.own_stride;
  for (int64_t k = begin; k < end; ++k) {
    const value_t at_other = load(other.values, k * features + feature, has_feature);
    value_t along_other = 0;
    if constexpr (kHasDirection) {
      along_other = load(other.tangents, k * features + feature, has_feature);
    }
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
      if (row + i >= own.count) continue;
      const value_t upstream = widen(g[i * side.own_stride + k * side.other_stride]);
      value_t of_rows = 0, of_weights = 0;
      Share::of(upstream, at_own[i] + at_other, along_own[i] + along_other, w, w_dot, of_rows,
                of_weights);
      sums[i] += of_rows;
      of_weight += of_weights;
    }
  }
#pragma unroll
  for (int i = 0; i < kOwnRows; ++i) {
    if (!has_feature || row + i >= own.count) continue;
    side.sums[((part * s.tasks + t) * own.count + row + i) * features + feature] = sums[i];
  }
  if (side.weights == nullptr) return;  // the same for the whole block
  of_warps[warp][lane] = of_weight;
  __syncthreads();
  if (warp != 0 || !has_feature) return;
  of_weight = 0;
  for (int i = 0; i < kWarps; ++i) of_weight += of_warps[i][lane];
  side.weights[((t * side.parts + part) * down + row_block) * features + feature] = of_weight;
}

// Sums [parts, count] or, for weights, [tasks, parts, features], added up in order.
template <typename value_t>
__device__ value_t sum_of_parts(const value_t* sums, int64_t parts, int64_t stride) {
  value_t total = 0;
  for (int64_t p = 0; p < parts; ++p) total += sums[p * stride];
  return total;
}

// grad = factor times the sum over parts, for both sides and the weight. A thread owns a number.
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    pair_finish_kernel(PairScoresShape s, Side<scalar_t> x, Side<scalar_t> y, int64_t weight_parts,
                       const acc_t<scalar_t>* factor, scalar_t* grad_x, scalar_t* grad_y,
                       acc_t<scalar_t>* grad_weight) {
  const int64_t of_x = s.tasks * s.queries * s.features, of_y = s.tasks * s.classes * s.features;
  int64_t place = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const auto finish = [&](const Side<scalar_t>& side, int64_t count, scalar_t* grad) {
    acc_t<scalar_t> sum = sum_of_parts(side.sums + place, side.parts, count);
    const int64_t t = place / s.features / side.own.count;
    if (factor != nullptr) sum *= factor[t * s.features + place % s.features];
    grad[place] = narrow<scalar_t>(sum);
  };
  if (place < of_x) return finish(x, of_x, grad_x);
  place -= of_x;
  if (place < of_y) return finish(y, of_y, grad_y);
  place -= of_y;
  if (place >= s.tasks * s.features) return;
  const int64_t first = place / s.features * weight_parts * s.features + place % s.features;
  grad_weight[place] = sum_of_parts(x.weights + first, weight_parts, s.features);
}

// grad_bias[t] = the sum of grad_scores[t]; a block owns a task.
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    pair_bias_kernel(int64_t pairs, const scalar_t* grad_scores, acc_t<scalar_t>* grad_bias) {
  acc_t<scalar_t> sum = 0;
  for (int64_t i = threadIdx.x; i < pairs; i += kThreads) {
    sum += widen(grad_scores[blockIdx.x * pairs + i]);
  }
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) grad_bias[blockIdx.x] = sum;
}

// The workspace, and both sides on it.
template <typename scalar_t>
struct Sides {
  Side<scalar_t> x, y;
  int64_t weight_parts;

  Sides(const PairScoresOperands& o, Workspace& space) {
    const auto& s = o.shape;
    const auto of_x = x_rows<scalar_t>(o), of_y = y_rows<scalar_t>(o);
    x = {of_x, of_y, s.classes, 1, parts_of(s, s.queries, s.classes), nullptr, nullptr};
    y = {of_y, of_x, 1, s.classes, parts_of(s, s.classes, s.queries), nullptr, nullptr};
    weight_parts = x.parts * row_blocks(s.queries);
    using value_t = acc_t<scalar_t>;
    x.sums = space.take<value_t>(x.parts * s.tasks * s.queries * s.features);
    y.sums = space.take<value_t>(y.parts * s.tasks * s.classes * s.features);
    x.weights = space.take<value_t>(s.tasks * weight_parts * s.features);
  }
};

template <template <typename> typename Share, typename scalar_t>
cudaError_t write_sums(const PairScoresOperands& o, const scalar_t* grad_scores,
                       const Sides<scalar_t>& sides, cudaStream_t stream) {
  const auto& s = o.shape;
  const int64_t across = s.tasks * feature_blocks(s.features);
  const int64_t x_blocks = sides.x.parts * across * row_blocks(s.queries);
  const int64_t y_blocks = sides.y.parts * across * row_blocks(s.classes);
  return with_phi(o.activation, [&](auto phi) {
    return launch(pair_gradient_kernel<Share<decltype(phi)>, scalar_t>, x_blocks + y_blocks,
                  kThreads, 0, stream, s, sides.x, sides.y, x_blocks, grad_scores,
                  static_cast<const acc_t<scalar_t>*>(o.weight),
                  static_cast<const acc_t<scalar_t>*>(o.weight_dot));
  });
}

template <template <typename> typename Term, typename scalar_t>
cudaError_t write_pair_sums(const PairScoresOperands& o, const void* bias, void* sums,
                            cudaStream_t stream) {
  using value_t = acc_t<scalar_t>;
  const auto& s = o.shape;
  const int64_t blocks = s.tasks * ceil_div(s.queries, kRows) * ceil_div(s.classes, kColumns);
  return with_phi(o.activation, [&](auto phi) {
    return launch(pair_sums_kernel<Term<decltype(phi)>, scalar_t>, blocks, kThreads, 0, stream,
                  x_rows<scalar_t>(o), y_rows<scalar_t>(o), static_cast<const value_t*>(o.weight),
                  static_cast<const value_t*>(o.weight_dot), static_cast<const value_t*>(bias),
                  static_cast<scalar_t*>(sums));
  });
}

}  // namespace

int launch_pair_sums(const PairScoresOperands& operands, const void* bias, void* sums,
                     void* stream) {
  return with_dtype(operands.dtype, [&](auto type) -> int {
    using scalar_t = typename decltype(type)::type;
    const auto on = static_cast<cudaStream_t>(stream);
    return operands.x_dot == nullptr
               ? write_pair_sums<ScoreTerm, scalar_t>(operands, bias, sums, on)
               : write_pair_sums<TangentTerm, scalar_t>(operands, bias, sums, on);
  });
}

int64_t pair_gradient_workspace(const PairScoresOperands& operands) {
  Workspace space(nullptr);
  with_dtype(operands.dtype,
             [&](auto type) { Sides<typename decltype(type)::type>(operands, space); });
  return space.bytes();
}

int launch_pair_gradient(const PairScoresOperands& operands, const void* grad_scores, void* grad_x,
                         void* grad_y, void* grad_weight, void* grad_bias, void* workspace,
                         void* stream) {
  return with_dtype(operands.dtype, [&](auto type) -> int {
    using scalar_t = typename decltype(type)::type;
    using value_t = acc_t<scalar_t>;
    const auto& s = operands.shape;
    const auto on = static_cast<cudaStream_t>(stream);
    const auto* g = static_cast<const scalar_t*>(grad_scores);
    const bool is_first = operands.x_dot == nullptr;
    cudaError_t error = launch(pair_bias_kernel<scalar_t>, s.tasks, kThreads, 0, on,
                               s.queries * s.classes, g, static_cast<value_t*>(grad_bias));
    if (error != cudaSuccess) return error;
    Workspace space(workspace);
    const Sides<scalar_t> sides(operands, space);
    error = is_first ? write_sums<GradientShare>(operands, g, sides, on)
                     : write_sums<BendShare>(operands, g, sides, on);
    if (error != cudaSuccess) return error;
    const int64_t numbers = s.tasks * s.features * (s.queries + s.classes + 1);
    return launch(pair_finish_kernel<scalar_t>, ceil_div(numbers, kThreads), kThreads, 0, on, s,
                  sides.x, sides.y, sides.weight_parts,
                  is_first ? static_cast<const value_t*>(operands.weight) : nullptr,
                  static_cast<scalar_t*>(grad_x), static_cast<scalar_t*>(grad_y),
                  static_cast<value_t*>(grad_weight));
  });
}

}  // namespace fastmeta
