#include "common/cuda/workspace.h"
#include "pairwise_distance/gradient.h"
#include "pairwise_distance/large_tile.cuh"
#include "pairwise_distance/pairwise_distance.h"

namespace fastmeta {
namespace {

// distance[t, q, n] = finish(sum_d Term(x[t, q, d], y[t, n, d])); [T, Q, D], [T, N, D] -> [T, Q,
// N].
// A block owns a tile of Q x N (tile.cuh); acc_t sums in registers. For cosine rows are normalised
// on the way into shared memory.
template <typename scalar_t, typename Term, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    distance_kernel(Metric metric, Rows<scalar_t> x, Rows<scalar_t> y, scalar_t* distance) {
  const auto tile = tile_position<Tile>(blockIdx.x, x.count, y.count);
  acc_t<scalar_t> distances[Tile::kM][Tile::kN];
  tile_distances<Term>(Tile{}, metric, x.task(tile.task), tile.row, y.task(tile.task), tile.column,
                       distances);
  const int rows = at_most(Tile::kRows, x.count - tile.row);
  const int columns = at_most(Tile::kColumns, y.count - tile.column);
  // 64 bits once for the tile; offsets within it are small.
  distance += (tile.task * x.count + tile.row) * y.count + tile.column;
#pragma unroll
  for (int i = 0; i < Tile::kM; ++i) {
    const int row = Tile::row(i);
    scalar_t* target = distance + row * y.count;
#pragma unroll
    for (int j = 0; j < Tile::kN; ++j) {
      const int column = Tile::column(j);
      if (row < rows && column < columns) target[column] = narrow<scalar_t>(distances[i][j]);
    }
  }
}

// weights = gradient_weight(upstream, distance) for the x of a chunk: [T, Q, N], upstream
// `upstream_stride` apart from task to task. Tiles as above; only the euclidean metric needs the
// distance, and forms it again.
template <typename scalar_t, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    weights_kernel(Metric metric, Rows<scalar_t> x, Rows<scalar_t> y, const scalar_t* upstream,
                   acc_t<scalar_t>* weights) {
  const auto tile = tile_position<Tile>(blockIdx.x, x.count, y.count);
  // The other metrics' weights do not depend on the distance.
  acc_t<scalar_t> distances[Tile::kM][Tile::kN] = {};
  if (metric == Metric::kEuclidean) {
    tile_distances<DifferenceTerm>(Tile{}, metric, x.task(tile.task), tile.row, y.task(tile.task),
                                   tile.column, distances);
  }
  const int rows = at_most(Tile::kRows, x.count - tile.row);
  const int columns = at_most(Tile::kColumns, y.count - tile.column);
  upstream += (tile.task * x.task_stride + tile.row) * y.count + tile.column;
  weights += (tile.task * x.count + tile.row) * y.count + tile.column;
#pragma unroll
  for (int i = 0; i < Tile::kM; ++i) {
    const int row = Tile::row(i);
    const scalar_t* source = upstream + row * y.count;
    acc_t<scalar_t>* target = weights + row * y.count;
#pragma unroll
    for (int j = 0; j < Tile::kN; ++j) {
      const int column = Tile::column(j);
      if (row < rows && column < columns) {
        target[column] = gradient_weight(metric, widen(source[column]), distances[i][j]);
      }
    }
  }
}

template <typename scalar_t>
cudaError_t write_distances(const PairwiseOperands& operands, void* distance, cudaStream_t stream) {
  const Chunk chunk = whole(operands.shape);
  const auto x = x_rows<scalar_t>(operands, chunk), y = y_rows<scalar_t>(operands, chunk);
  return with_tile<scalar_t>(operands, [&](auto tile) {
    using Tile = decltype(tile);
    return with_term(operands.metric, [&](auto term) {
      return launch(distance_kernel<scalar_t, decltype(term), Tile>,
                    count_tiles<Tile>(chunk.tasks, x.count, y.count), Tile::kThreads,
                    Tile::kSharedBytes, stream, operands.metric, x, y,
                    static_cast<scalar_t*>(distance));
    });
  });
}

template <typename scalar_t>
cudaError_t write_weights(const PairwiseOperands& operands, const Chunk& chunk,
                          const void* grad_distance, void* weights, cudaStream_t stream) {
  const auto& shape = operands.shape;
  const auto x = x_rows<scalar_t>(operands, chunk), y = y_rows<scalar_t>(operands, chunk);
  const int64_t first = (chunk.first_task * shape.queries + chunk.first_row) * shape.classes;
  return with_tile<scalar_t>(operands, [&](auto tile) {
    using Tile = decltype(tile);
    return launch(weights_kernel<scalar_t, Tile>, count_tiles<Tile>(chunk.tasks, x.count, y.count),
                  Tile::kThreads, Tile::kSharedBytes, stream, operands.metric, x, y,
                  static_cast<const scalar_t*>(grad_distance) + first,
                  static_cast<acc_t<scalar_t>*>(weights));
  });
}

// Chooses the tiles in which the operands' distances are made.
PairwiseOperands tiled(PairwiseOperands operands) {
  const auto& shape = operands.shape;
  operands.large_tiles =
      uses_large_tiles(operands, count_tiles<LargeTile>(shape.tasks, shape.queries, shape.classes));
  return operands;
}

}  // namespace

int64_t pairwise_distance_workspace(const PairwiseOperands& operands) {
  return row_norms_bytes(tiled(operands));
}

int launch_pairwise_distance(PairwiseOperands operands, void* distance, void* workspace,
                             void* stream) {
  operands = tiled(operands);
  const int error = launch_row_norms(operands, workspace, stream);
  if (error != cudaSuccess) return error;
  return with_dtype(operands.dtype, [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    return write_distances<scalar_t>(operands, distance, static_cast<cudaStream_t>(stream));
  });
}

int64_t pairwise_distance_backward_workspace(const PairwiseOperands& operands) {
  return row_norms_bytes(tiled(operands)) + pairwise_gradient_workspace(operands);
}

int launch_pairwise_distance_backward(PairwiseOperands operands, const void* grad_distance,
                                      void* grad_x, void* grad_y, void* workspace, void* stream) {
  operands = tiled(operands);
  Workspace space(workspace);
  const int error = launch_row_norms(operands, space.take<char>(row_norms_bytes(operands)), stream);
  if (error != cudaSuccess) return error;
  const auto weigh = [&](const Chunk& chunk, void* weights) -> int {
    return with_dtype(operands.dtype, [&](auto type) {
      using scalar_t = typename decltype(type)::type;
      return write_weights<scalar_t>(operands, chunk, grad_distance, weights,
                                     static_cast<cudaStream_t>(stream));
    });
  };
  // Behind the norms, which the gradient's tiles read as well.
  void* rest = space.take<char>(pairwise_gradient_workspace(operands));
  return launch_pairwise_gradient(operands, weigh, grad_x, grad_y, rest, stream);
}

}  // namespace fastmeta
