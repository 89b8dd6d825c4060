// Losses of queries over their distances to the rows of y, and their gradient, on a GPU; the twin of
// row_loss_cpu.h.
//
// A loss is a class template Loss<scalar_t>, made of its operands and a chunk of queries, with
//
//   Row, Column           what is known of a query (a struct that begins with its label) and of a
//                         row of y, in shared memory; kHasColumns: whether there is any Column
//   row(label)            the Row of a query
//   State                 of some columns of a row, with an empty one and merged(a, b)
//   column(task, n)       the Column of row n of y
//   is_valid(label)       whether a label of a query, if not kAbsent, is one
//   state(row, columns, logits)      State of a lane's columns
//   value(row, state)     the loss of a query
//   residuals(row, state) a function (columns, j, logit) -> derivative of the loss in the logit
//
// and its operands have the fields pairwise, labels (of queries) and scale.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "common/absent.h"
#include "common/cuda/workspace.h"
#include "pairwise_distance/gradient.h"
#include "pairwise_distance/large_tile.cuh"
#include "pairwise_distance/row_loss.h"

namespace fastmeta {

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

template <typename value_t>
__device__ Softmax<value_t> from_lane(const Softmax<value_t>& softmax, int offset, int width) {
  return {__shfl_down_sync(kAllLanes, softmax.largest, offset, width),
          __shfl_down_sync(kAllLanes, softmax.sum, offset, width)};
}

template <typename value_t>
__device__ void invalidate(Softmax<value_t>& softmax) {
  softmax.sum = std::numeric_limits<value_t>::quiet_NaN();
}

// A lane's columns of a tile, for the row `row` of the task's queries.
template <typename Tile, typename Column>
struct LaneColumns {
  const Column* shared;  // of the tile, or null
  int64_t row, first;    // row of x, and the row of y of the tile's first column
  int count;             // of the tile

  // The j-th column of the lane, in the tile.
  __device__ int place(int j) const { return Tile::column(j); }
  __device__ bool has(int j) const { return place(j) < count; }
};

// Arrays of the queries of a chunk, from its first query on; tasks as far apart as rows of queries.
template <typename scalar_t, typename State>
struct Queries {
  Metric metric;
  acc_t<scalar_t> scale;
  const int64_t* labels;
  const acc_t<scalar_t>* weight;  // only with weights
  acc_t<scalar_t>* weights;       // W [tasks, rows, N] of the chunk, or null
  acc_t<scalar_t>* loss;
  State* states;  // or null
};

// Sets columns[c] for the columns of a tile. Called by the whole block.
template <typename Tile, typename Loss>
__device__ void stage_columns(const Loss& loss, int64_t task, int64_t first, int count,
                              typename Loss::Column* columns) {
  if constexpr (Loss::kHasColumns) {
    __syncthreads();  // for readers of the columns before
    for (int c = threadIdx.x; c < count; c += Tile::kThreads) {
      columns[c] = loss.column(task, first + c);
    }
    __syncthreads();
  }
}

// Merges states: of every `lanes` lanes that are `step` apart the first gets the state of all.
template <int lanes, int step, typename State>
__device__ State merged_over_lanes(State state) {
#pragma unroll
  for (int offset = lanes * step / 2; offset >= step; offset /= 2) {
    state = merged(state, from_lane(state, offset, lanes * step));
  }
  return state;
}

// Writes the tile of W at `tile` from its distances; state_of(i) is the state of row(i).
template <typename Tile, typename scalar_t, typename Loss, typename StateOf>
__device__ void write_weights(const Queries<scalar_t, typename Loss::State>& queries,
                              const Loss& loss, const Rows<scalar_t>& query, int64_t classes,
                              const TilePosition& tile, const typename Loss::Column* columns,
                              const acc_t<scalar_t> (&distances)[Tile::kM][Tile::kN],
                              const StateOf& state_of) {
  const int count = at_most(Tile::kColumns, classes - tile.column);
#pragma unroll
  for (int i = 0; i < Tile::kM; ++i) {
    const int64_t row = tile.row + Tile::row(i);
    if (row >= query.count) continue;
    const int64_t q = tile.task * query.task_stride + row;
    const auto of_query = Loss::row(queries.labels[q]);
    const bool is_absent = of_query.label == kAbsent;
    const auto weight = queries.weight[q];
    const auto residual = loss.residuals(of_query, state_of(i));
    const LaneColumns<Tile, typename Loss::Column> lane{columns, row, tile.column, count};
    acc_t<scalar_t>* target =
        queries.weights + (tile.task * query.count + row) * classes + tile.column;
#pragma unroll
    for (int j = 0; j < Tile::kN; ++j) {
      if (!lane.has(j)) continue;
      const auto distance = distances[i][j];
      const auto of_logit = residual(lane, j, -queries.scale * distance);
      const auto upstream = loss_upstream(queries.scale, weight, of_logit);
      // Not by a weight of 0: values at absent places may have no softmax.
      target[lane.place(j)] = is_absent ? 0 : gradient_weight(queries.metric, upstream, distance);
    }
  }
}

// Loss of each query of a chunk. query [T, Q, D], y [T, N, D], loss [T, Q].
// A block owns a tile's rows of queries and walks the tiles of y. It merges the state of each tile
// into a running one of each row and column of warps, in shared memory: the [Q, N] distances exist a
// tile at a time. If one tile has all rows of y, W is written in the same launch: small episodes are
// bound by launches.
template <typename scalar_t, typename Term, typename Tile, typename Loss>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    row_loss_kernel(Rows<scalar_t> query, Rows<scalar_t> y,
                    Queries<scalar_t, typename Loss::State> queries, Loss loss) {
  using value_t = acc_t<scalar_t>;
  using Column = typename Loss::Column;
  __shared__ typename Loss::Row rows[Tile::kRows];
  __shared__ typename Loss::State states[Tile::kWarpColumns][Tile::kRows];
  __shared__ Column columns[Loss::kHasColumns ? Tile::kColumns : 1];
  const auto tile = tile_position<Tile>(blockIdx.x, query.count, 1);
  const int64_t classes = y.count;
  const int thread = threadIdx.x;
  const int64_t first_query = tile.task * query.task_stride + tile.row;
  const bool owns_query = thread < Tile::kRows && tile.row + thread < query.count;
  if (thread < Tile::kRows) {
    // Rows past the end get label 0, so that no read below is out of range; nothing of them is
    // stored.
    rows[thread] = Loss::row(owns_query ? (queries.labels + first_query)[thread] : 0);
    for (int w = 0; w < Tile::kWarpColumns; ++w) states[w][thread] = Loss::empty();
  }
  __syncthreads();

  value_t distances[Tile::kM][Tile::kN];
  for (int64_t first = 0; first < classes; first += Tile::kColumns) {
    const int count = at_most(Tile::kColumns, classes - first);
    stage_columns<Tile>(loss, tile.task, first, count, columns);
    tile_distances<Term>(Tile{}, queries.metric, query.task(tile.task), tile.row, y.task(tile.task),
                         first, distances);
#pragma unroll
    for (int i = 0; i < Tile::kM; ++i) {
      const int row = Tile::row(i);
      const LaneColumns<Tile, Column> lane{columns, tile.row + row, first, count};
      value_t logits[Tile::kN];
#pragma unroll
      for (int j = 0; j < Tile::kN; ++j) {
        // Columns past the end have probability 0.
        logits[j] = lane.has(j) ? -queries.scale * distances[i][j]
                                : -std::numeric_limits<value_t>::infinity();
      }
      const auto state = merged_over_lanes<Tile::kLaneColumns, Tile::kLaneColumnStep>(
          loss.state(rows[row], lane, logits));
      auto& running = states[Tile::warp_column()][row];
      // Each warp column has a running state of its own: no atomics, a fixed order.
      if (Tile::is_first_lane_of_row()) running = merged(running, state);
    }
  }
  __syncthreads();
  if (owns_query) {
    auto state = states[0][thread];
#pragma unroll
    for (int w = 1; w < Tile::kWarpColumns; ++w) state = merged(state, states[w][thread]);
    const auto& row = rows[thread];
    const bool is_absent = row.label == kAbsent;
    // A kernel cannot raise: an invalid label shows as NaN in the loss and the gradient.
    if (!is_absent && !loss.is_valid(row.label, classes)) invalidate(state);
    (queries.loss + first_query)[thread] = is_absent ? 0 : loss.value(row, state);
    if (queries.states != nullptr) (queries.states + first_query)[thread] = state;
    // For write_weights() below.
    states[0][thread] = state;
  }
  // Only a small tile can have all rows of y, see fits_one_tile().
  if constexpr (std::is_same_v<Tile, SmallTile>) {
    if (queries.weights == nullptr) return;
    __syncthreads();
    write_weights<Tile>(queries, loss, query, classes, tile, columns, distances,
                        [&](int i) { return states[0][Tile::row(i)]; });
  }
}

// W of a chunk of queries, from their states. A block owns a tile of Q x N and forms its distances
// again, bit for bit as row_loss_kernel did.
template <typename scalar_t, typename Term, typename Tile, typename Loss>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    loss_weights_kernel(Rows<scalar_t> query, Rows<scalar_t> y,
                        Queries<scalar_t, typename Loss::State> queries, Loss loss) {
  __shared__ typename Loss::Column columns[Loss::kHasColumns ? Tile::kColumns : 1];
  const auto tile = tile_position<Tile>(blockIdx.x, query.count, y.count);
  stage_columns<Tile>(loss, tile.task, tile.column, at_most(Tile::kColumns, y.count - tile.column),
                      columns);
  acc_t<scalar_t> distances[Tile::kM][Tile::kN];
  tile_distances<Term>(Tile{}, queries.metric, query.task(tile.task), tile.row, y.task(tile.task),
                       tile.column, distances);
  write_weights<Tile>(queries, loss, query, y.count, tile, columns, distances, [&](int i) {
    return queries.states[tile.task * query.task_stride + tile.row + Tile::row(i)];
  });
}

inline bool fits_one_tile(const PairwiseShape& shape) {
  return shape.classes <= SmallTile::kColumns;
}

// Launches the kernels above on chunks of queries.
template <typename scalar_t, template <typename> class Loss, typename Operands>
class RowLoss {
  using value_t = acc_t<scalar_t>;
  using State = typename Loss<scalar_t>::State;

 public:
  RowLoss(const Operands& operands, const void* weight, void* loss, void* states, void* stream)
      : operands_(operands),
        weight_(static_cast<const value_t*>(weight)),
        loss_(static_cast<value_t*>(loss)),
        states_(static_cast<State*>(states)),
        stream_(static_cast<cudaStream_t>(stream)) {}

  // Computes the loss; `weights`: destination of W of the chunk if one tile has all rows of y, else
  // null.
  cudaError_t write_loss(const Chunk& chunk, void* weights) const {
    return run(chunk, weights, 1, [](auto term, auto tile) {
      return row_loss_kernel<scalar_t, decltype(term), decltype(tile), Loss<scalar_t>>;
    });
  }

  cudaError_t write_weights(const Chunk& chunk, void* weights) const {
    return run(chunk, weights, operands_.pairwise.shape.classes, [](auto term, auto tile) {
      return loss_weights_kernel<scalar_t, decltype(term), decltype(tile), Loss<scalar_t>>;
    });
  }

 private:
  // Launches kernel_of(term, tile) on a block for every tile of [tasks, rows, columns].
  template <typename KernelOf>
  cudaError_t run(const Chunk& chunk, void* weights, int64_t columns,
                  const KernelOf& kernel_of) const {
    const auto query = x_rows<scalar_t>(operands_.pairwise, chunk);
    const auto y = y_rows<scalar_t>(operands_.pairwise, chunk);
    const auto queries = queries_of(chunk, weights);
    const Loss<scalar_t> loss(operands_, chunk);
    return with_tile<scalar_t>(operands_.pairwise, [&](auto tile) {
      using Tile = decltype(tile);
      return with_term(operands_.pairwise.metric, [&](auto term) {
        return launch(kernel_of(term, tile), count_tiles<Tile>(chunk.tasks, chunk.rows, columns),
                      Tile::kThreads, Tile::kSharedBytes, stream_, query, y, queries, loss);
      });
    });
  }

  Queries<scalar_t, State> queries_of(const Chunk& chunk, void* weights) const {
    const auto& pairwise = operands_.pairwise;
    const int64_t first = chunk.first_task * pairwise.shape.queries + chunk.first_row;
    return {.metric = pairwise.metric,
            .scale = static_cast<value_t>(operands_.scale),
            .labels = operands_.labels + first,
            .weight = weight_ == nullptr ? nullptr : weight_ + first,
            .weights = static_cast<value_t*>(weights),
            .loss = loss_ + first,
            .states = states_ == nullptr ? nullptr : states_ + first};
  }

  const Operands operands_;
  const value_t* const weight_;
  value_t* const loss_;
  State* const states_;
  const cudaStream_t stream_;
};

// Parts of the backward's workspace.
template <template <typename> class Loss>
struct LossBackwardSpace {
  void* row_norms;
  void* states = nullptr;  // of each query, if W is not written along with the loss
  void* gradient;
  int64_t bytes;

  LossBackwardSpace(const PairwiseOperands& operands, void* workspace) {
    const auto& shape = operands.shape;
    Workspace space(workspace);
    row_norms = space.take<char>(row_norms_bytes(operands));
    if (!fits_one_tile(shape)) {
      states = with_dtype(operands.dtype, [&](auto type) -> void* {
        using State = typename Loss<typename decltype(type)::type>::State;
        return space.take<State>(shape.tasks * shape.queries);
      });
    }
    gradient = space.take<char>(pairwise_gradient_workspace(operands));
    bytes = space.bytes();
  }
};

// Chooses the tiles of the distances: the same ones in both kernels, or W would not get the bits of
// the distances in the loss.
inline PairwiseOperands tiled(PairwiseOperands operands) {
  const auto& shape = operands.shape;
  operands.large_tiles =
      uses_large_tiles(operands, count_tiles<LargeTile>(shape.tasks, shape.queries, 1));
  return operands;
}

inline int64_t row_loss_workspace(const PairwiseOperands& operands) {
  return row_norms_bytes(tiled(operands));
}

template <template <typename> class Loss, typename Operands>
int launch_row_loss(Operands operands, void* loss, void* workspace, void* stream) {
  auto& pairwise = operands.pairwise = tiled(operands.pairwise);
  const int error = launch_row_norms(pairwise, workspace, stream);
  if (error != cudaSuccess) return error;
  return with_dtype(pairwise.dtype, [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    return RowLoss<scalar_t, Loss, Operands>(operands, nullptr, loss, nullptr, stream)
        .write_loss(whole(pairwise.shape), nullptr);
  });
}

template <template <typename> class Loss>
int64_t row_loss_backward_workspace(const PairwiseOperands& operands) {
  return LossBackwardSpace<Loss>(tiled(operands), nullptr).bytes;
}

template <template <typename> class Loss, typename Operands>
int launch_row_loss_backward(Operands operands, const void* weight, void* loss, void* grad_query,
                             void* grad_y, void* workspace, void* stream) {
  auto& pairwise = operands.pairwise = tiled(operands.pairwise);
  const LossBackwardSpace<Loss> space(pairwise, workspace);
  const int error = launch_row_norms(pairwise, space.row_norms, stream);
  if (error != cudaSuccess) return error;
  return with_dtype(pairwise.dtype, [&](auto type) -> int {
    const RowLoss<typename decltype(type)::type, Loss, Operands> op(operands, weight, loss,
                                                                    space.states, stream);
    const bool one_launch = fits_one_tile(pairwise.shape);
    const auto weigh = [&](const Chunk& chunk, void* weights) -> int {
      return one_launch ? op.write_loss(chunk, weights) : op.write_weights(chunk, weights);
    };
    // With one launch `weigh` writes the loss along with W.
    const int error = one_launch ? cudaSuccess : op.write_loss(whole(pairwise.shape), nullptr);
    if (error != cudaSuccess) return error;
    return launch_pairwise_gradient(pairwise, weigh, grad_query, grad_y, space.gradient, stream);
  });
}

}  // namespace fastmeta
