#include <cmath>
#include <limits>
#include <type_traits>

#include "common/cuda/workspace.h"
#include "pairwise_distance/gradient.h"
#include "pairwise_distance/large_tile.cuh"
#include "prototype_loss/prototype_loss.h"

namespace fastmeta {
namespace {

// Softmax over some logits: sum of exp(logit - largest).
template <typename value_t>
struct Softmax {
  value_t largest, sum;
};

// Softmax over no logits. A finite start keeps logits of -inf from making a NaN.
template <typename value_t>
__device__ Softmax<value_t> empty_softmax() {
  return {std::numeric_limits<value_t>::lowest(), 0};
}

template <typename value_t>
__device__ value_t larger_of(value_t a, value_t b) {
  return a < b ? b : a;
}

template <typename value_t, int n>
__device__ Softmax<value_t> softmax_of(const value_t (&logits)[n]) {
  auto softmax = empty_softmax<value_t>();
#pragma unroll
  for (int i = 0; i < n; ++i) softmax.largest = larger_of(softmax.largest, logits[i]);
#pragma unroll
  for (int i = 0; i < n; ++i) softmax.sum += std::exp(logits[i] - softmax.largest);
  return softmax;
}

template <typename value_t>
__device__ Softmax<value_t> merged(const Softmax<value_t>& a, const Softmax<value_t>& b) {
  const value_t largest = larger_of(a.largest, b.largest);
  return {largest, a.sum * std::exp(a.largest - largest) + b.sum * std::exp(b.largest - largest)};
}

// Merges softmaxes: of every `lanes` lanes that are `step` apart the first gets the softmax over
// the logits of all.
template <int lanes, int step, typename value_t>
__device__ Softmax<value_t> merged_over_lanes(Softmax<value_t> softmax) {
#pragma unroll
  for (int offset = lanes * step / 2; offset >= step; offset /= 2) {
    const value_t largest = __shfl_down_sync(kAllLanes, softmax.largest, offset, lanes * step);
    const value_t sum = __shfl_down_sync(kAllLanes, softmax.sum, offset, lanes * step);
    softmax = merged(softmax, {largest, sum});
  }
  return softmax;
}

// Arrays of the queries of a chunk, from its first query on; tasks as far apart as rows of queries.
template <typename scalar_t>
struct Queries {
  Metric metric;
  acc_t<scalar_t> scale;
  const int64_t* labels;
  const acc_t<scalar_t>* weight;  // only with weights
  acc_t<scalar_t>* weights;       // W [tasks, rows, N] of the chunk, or null
  acc_t<scalar_t>* loss;
  Softmax<acc_t<scalar_t>>* softmax;  // or null
};

// Converts index to int, or to -1 outside of 0 <= index < size.
__device__ int index_in(int size, int64_t index) {
  return index >= 0 && index < size ? static_cast<int>(index) : -1;
}

// Writes the tile of W at `tile` from its distances; softmax_of(i) is the softmax of row(i).
template <typename Tile, typename scalar_t, typename SoftmaxOf>
__device__ void write_weights(const Queries<scalar_t>& queries, const Rows<scalar_t>& query,
                              int64_t classes, const TilePosition& tile,
                              const acc_t<scalar_t> (&distances)[Tile::kM][Tile::kN],
                              const SoftmaxOf& softmax_of) {
  const int columns = at_most(Tile::kColumns, classes - tile.column);
#pragma unroll
  for (int i = 0; i < Tile::kM; ++i) {
    const int64_t row = tile.row + Tile::row(i);
    if (row >= query.count) continue;
    const int64_t q = tile.task * query.task_stride + row;
    const bool is_absent = queries.labels[q] == kAbsent;
    // Relative to this tile: -1 if the label's prototype lies in another tile.
    const int label = index_in(columns, queries.labels[q] - tile.column);
    const auto weight = queries.weight[q];
    const Softmax<acc_t<scalar_t>> softmax = softmax_of(i);
    // One division a row instead of one a class.
    const auto inverse_sum = 1 / softmax.sum;
    acc_t<scalar_t>* target =
        queries.weights + (tile.task * query.count + row) * classes + tile.column;
#pragma unroll
    for (int j = 0; j < Tile::kN; ++j) {
      const int column = Tile::column(j);
      if (column >= columns) continue;
      const auto distance = distances[i][j];
      const auto probability = std::exp(-queries.scale * distance - softmax.largest) * inverse_sum;
      const auto upstream = distance_upstream(queries.scale, weight, probability, column == label);
      // Not by a weight of 0: values at absent places may have no softmax.
      target[column] = is_absent ? 0 : gradient_weight(queries.metric, upstream, distance);
    }
  }
}

// loss[q] = log(sum) + largest - logit[label], softmax over logits -scale d(query[q], prototypes).
// query [T, Q, D], prototypes [T, N, D], loss [T, Q].
// A block owns a tile's rows of queries and walks the tiles of prototypes. It merges the softmax of
// each tile into a running one of each row and column of warps, in shared memory: the [Q, N]
// distances exist a tile at a time. If one tile has all prototypes, W is written in the same
// launch: small episodes are bound by launches.
template <typename scalar_t, typename Term, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    loss_kernel(Rows<scalar_t> query, Rows<scalar_t> prototypes, Queries<scalar_t> queries) {
  using value_t = acc_t<scalar_t>;
  __shared__ int64_t labels[Tile::kRows];
  __shared__ value_t label_logits[Tile::kRows];
  __shared__ Softmax<value_t> softmaxes[Tile::kWarpColumns][Tile::kRows];
  const auto tile = tile_position<Tile>(blockIdx.x, query.count, 1);
  const int64_t classes = prototypes.count;
  const int thread = threadIdx.x;
  const int64_t first_query = tile.task * query.task_stride + tile.row;
  const bool owns_query = thread < Tile::kRows && tile.row + thread < query.count;
  if (thread < Tile::kRows) {
    // Rows past the end get label 0, so that no read below is out of range; nothing of them is
    // stored.
    labels[thread] = owns_query ? (queries.labels + first_query)[thread] : 0;
    label_logits[thread] = 0;
    for (int w = 0; w < Tile::kWarpColumns; ++w) softmaxes[w][thread] = empty_softmax<value_t>();
  }
  __syncthreads();

  value_t distances[Tile::kM][Tile::kN];
  for (int64_t first = 0; first < classes; first += Tile::kColumns) {
    tile_distances<Term>(Tile{}, queries.metric, query.task(tile.task), tile.row,
                         prototypes.task(tile.task), first, distances);
    const int columns = at_most(Tile::kColumns, classes - first);
#pragma unroll
    for (int i = 0; i < Tile::kM; ++i) {
      const int row = Tile::row(i), label = index_in(columns, labels[row] - first);
      value_t logits[Tile::kN];
#pragma unroll
      for (int j = 0; j < Tile::kN; ++j) {
        const int column = Tile::column(j);
        // Columns past the end have probability 0.
        logits[j] = column < columns ? -queries.scale * distances[i][j]
                                     : -std::numeric_limits<value_t>::infinity();
        // At most one lane owns the label's column, so there is no race.
        if (column == label) label_logits[row] = logits[j];
      }
      const auto softmax =
          merged_over_lanes<Tile::kLaneColumns, Tile::kLaneColumnStep>(softmax_of(logits));
      auto& running = softmaxes[Tile::warp_column()][row];
      // Each warp column has a running softmax of its own: no atomics, a fixed order.
      if (Tile::is_first_lane_of_row()) running = merged(running, softmax);
    }
  }
  __syncthreads();
  if (owns_query) {
    auto softmax = softmaxes[0][thread];
#pragma unroll
    for (int w = 1; w < Tile::kWarpColumns; ++w) softmax = merged(softmax, softmaxes[w][thread]);
    const bool is_valid = labels[thread] >= 0 && labels[thread] < classes;
    const bool is_absent = labels[thread] == kAbsent;
    // A kernel cannot raise: an invalid label shows as NaN in the loss and the gradient.
    if (!is_valid && !is_absent) softmax.sum = std::numeric_limits<value_t>::quiet_NaN();
    (queries.loss + first_query)[thread] =
        is_absent ? 0 : std::log(softmax.sum) + (softmax.largest - label_logits[thread]);
    if (queries.softmax != nullptr) (queries.softmax + first_query)[thread] = softmax;
    // For write_weights() below.
    softmaxes[0][thread] = softmax;
  }
  // Only a small tile can have all prototypes, see fits_one_tile().
  if constexpr (std::is_same_v<Tile, SmallTile>) {
    if (queries.weights == nullptr) return;
    __syncthreads();
    write_weights<Tile>(queries, query, classes, tile, distances,
                        [&](int i) { return softmaxes[0][Tile::row(i)]; });
  }
}

// W of a chunk of queries, from their softmax. A block owns a tile of Q x N and forms its distances
// again, bit for bit as loss_kernel did.
template <typename scalar_t, typename Term, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    weights_kernel(Rows<scalar_t> query, Rows<scalar_t> prototypes, Queries<scalar_t> queries) {
  const auto tile = tile_position<Tile>(blockIdx.x, query.count, prototypes.count);
  acc_t<scalar_t> distances[Tile::kM][Tile::kN];
  tile_distances<Term>(Tile{}, queries.metric, query.task(tile.task), tile.row,
                       prototypes.task(tile.task), tile.column, distances);
  write_weights<Tile>(queries, query, prototypes.count, tile, distances, [&](int i) {
    return queries.softmax[tile.task * query.task_stride + tile.row + Tile::row(i)];
  });
}

bool fits_one_tile(const PairwiseShape& shape) { return shape.classes <= SmallTile::kColumns; }

// Launches the kernels above on chunks of queries.
template <typename scalar_t>
class PrototypeLoss {
  using value_t = acc_t<scalar_t>;

 public:
  PrototypeLoss(const LossOperands& operands, const void* weight, void* loss, void* softmax,
                void* stream)
      : operands_(operands),
        weight_(static_cast<const value_t*>(weight)),
        loss_(static_cast<value_t*>(loss)),
        softmax_(static_cast<Softmax<value_t>*>(softmax)),
        stream_(static_cast<cudaStream_t>(stream)) {}

  // Computes the loss; `weights`: destination of W of the chunk if one tile has all prototypes,
  // else null.
  cudaError_t write_loss(const Chunk& chunk, void* weights) const {
    return run(chunk, weights, 1, [](auto term, auto tile) {
      return loss_kernel<scalar_t, decltype(term), decltype(tile)>;
    });
  }

  cudaError_t write_weights(const Chunk& chunk, void* weights) const {
    return run(chunk, weights, operands_.pairwise.shape.classes, [](auto term, auto tile) {
      return weights_kernel<scalar_t, decltype(term), decltype(tile)>;
    });
  }

 private:
  // Launches kernel_of(term, tile) on a block for every tile of [tasks, rows, columns].
  template <typename KernelOf>
  cudaError_t run(const Chunk& chunk, void* weights, int64_t columns,
                  const KernelOf& kernel_of) const {
    const auto query = x_rows<scalar_t>(operands_.pairwise, chunk);
    const auto prototypes = y_rows<scalar_t>(operands_.pairwise, chunk);
    const auto queries = queries_of(chunk, weights);
    return with_tile<scalar_t>(operands_.pairwise, [&](auto tile) {
      using Tile = decltype(tile);
      return with_term(operands_.pairwise.metric, [&](auto term) {
        return launch(kernel_of(term, tile), count_tiles<Tile>(chunk.tasks, chunk.rows, columns),
                      Tile::kThreads, Tile::kSharedBytes, stream_, query, prototypes, queries);
      });
    });
  }

  Queries<scalar_t> queries_of(const Chunk& chunk, void* weights) const {
    const auto& pairwise = operands_.pairwise;
    const int64_t first = chunk.first_task * pairwise.shape.queries + chunk.first_row;
    return {.metric = pairwise.metric,
            .scale = static_cast<value_t>(operands_.scale),
            .labels = operands_.labels + first,
            .weight = weight_ == nullptr ? nullptr : weight_ + first,
            .weights = static_cast<value_t*>(weights),
            .loss = loss_ + first,
            .softmax = softmax_ == nullptr ? nullptr : softmax_ + first};
  }

  const LossOperands operands_;
  const value_t* const weight_;
  value_t* const loss_;
  Softmax<value_t>* const softmax_;
  const cudaStream_t stream_;
};

// Parts of the backward's workspace.
struct BackwardSpace {
  void* row_norms;
  void* softmax = nullptr;  // of each query, if W is not written along with the loss
  void* gradient;
  int64_t bytes;

  BackwardSpace(const PairwiseOperands& operands, void* workspace) {
    const auto& shape = operands.shape;
    Workspace space(workspace);
    row_norms = space.take<char>(row_norms_bytes(operands));
    if (!fits_one_tile(shape)) {
      softmax = with_dtype(operands.dtype, [&](auto type) -> void* {
        using value_t = acc_t<typename decltype(type)::type>;
        return space.take<Softmax<value_t>>(shape.tasks * shape.queries);
      });
    }
    gradient = space.take<char>(pairwise_gradient_workspace(operands));
    bytes = space.bytes();
  }
};

// Chooses the tiles of the distances: the same ones in both kernels, or W would not get the bits of
// the distances in the loss.
PairwiseOperands tiled(PairwiseOperands operands) {
  const auto& shape = operands.shape;
  operands.large_tiles =
      uses_large_tiles(operands, count_tiles<LargeTile>(shape.tasks, shape.queries, 1));
  return operands;
}

}  // namespace

int64_t prototype_loss_workspace(const LossOperands& operands) {
  return row_norms_bytes(tiled(operands.pairwise));
}

int launch_prototype_loss(LossOperands operands, void* loss, void* workspace, void* stream) {
  auto& pairwise = operands.pairwise = tiled(operands.pairwise);
  const int error = launch_row_norms(pairwise, workspace, stream);
  if (error != cudaSuccess) return error;
  return with_dtype(pairwise.dtype, [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    return PrototypeLoss<scalar_t>(operands, nullptr, loss, nullptr, stream)
        .write_loss(whole(pairwise.shape), nullptr);
  });
}

int64_t prototype_loss_backward_workspace(const LossOperands& operands) {
  return BackwardSpace(tiled(operands.pairwise), nullptr).bytes;
}

int launch_prototype_loss_backward(LossOperands operands, const void* weight, void* loss,
                                   void* grad_query, void* grad_prototypes, void* workspace,
                                   void* stream) {
  auto& pairwise = operands.pairwise = tiled(operands.pairwise);
  const BackwardSpace space(pairwise, workspace);
  const int error = launch_row_norms(pairwise, space.row_norms, stream);
  if (error != cudaSuccess) return error;
  return with_dtype(pairwise.dtype, [&](auto type) -> int {
    const PrototypeLoss<typename decltype(type)::type> op(operands, weight, loss, space.softmax,
                                                          stream);
    const bool one_launch = fits_one_tile(pairwise.shape);
    const auto weigh = [&](const Chunk& chunk, void* weights) -> int {
      return one_launch ? op.write_loss(chunk, weights) : op.write_weights(chunk, weights);
    };
    // With one launch `weigh` writes the loss along with W.
    const int error = one_launch ? cudaSuccess : op.write_loss(whole(pairwise.shape), nullptr);
    if (error != cudaSuccess) return error;
    return launch_pairwise_gradient(pairwise, weigh, grad_query, grad_prototypes, space.gradient,
                                    stream);
  });
}

}  // namespace fastmeta
