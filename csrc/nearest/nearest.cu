#include <limits>

#include "common/cuda/workspace.h"
#include "nearest/nearest.h"
#include "pairwise_distance/large_tile.cuh"

namespace fastmeta {
namespace {

// Comes after every neighbour, NaN included.
template <typename value_t>
__device__ Neighbour<value_t> nobody() {
  return {std::numeric_limits<value_t>::quiet_NaN(), std::numeric_limits<int64_t>::max()};
}

// Arrays of all queries.
template <typename scalar_t>
struct Found {
  const bool* present;                // [T, N], or null
  scalar_t* distances;                // [T, Q, k]
  int64_t* indices;                   // [T, Q, k]
  Neighbour<acc_t<scalar_t>>* lists;  // [T, Q, columns of warps, k]
  int64_t k;
};

// The first of the neighbours of the lanes that share a row of the tile; every lane gets it.
template <typename Tile, typename value_t>
__device__ Neighbour<value_t> first_of_row(Neighbour<value_t> own) {
#pragma unroll
  for (int offset = Tile::kLaneColumnStep; offset < Tile::kLaneColumns * Tile::kLaneColumnStep;
       offset *= 2) {
    const Neighbour<value_t> other{__shfl_xor_sync(kAllLanes, own.distance, offset),
                                   __shfl_xor_sync(kAllLanes, own.index, offset)};
    if (other.is_before(own)) own = other;
  }
  return own;
}

// Puts a neighbour in its place, and returns the last of the k.
template <typename value_t>
__device__ Neighbour<value_t> insert(Neighbour<value_t>* list, int64_t k,
                                     const Neighbour<value_t>& neighbour) {
  int64_t place = k - 1;
  for (; place > 0 && neighbour.is_before(list[place - 1]); --place) list[place] = list[place - 1];
  list[place] = neighbour;
  return list[k - 1];
}

// A lane's part of a row of a tile of distances.
template <typename Tile, typename value_t>
struct RowOfLane {
  const value_t (&distances)[Tile::kN];
  int64_t first_column;
  unsigned left;  // bit j: column(j) is there, present, and not in the list

  __device__ Neighbour<value_t> first() const {
    auto best = nobody<value_t>();
#pragma unroll
    for (int j = 0; j < Tile::kN; ++j) {
      const Neighbour<value_t> other{distances[j], first_column + Tile::column(j)};
      if ((left >> j & 1U) != 0 && other.is_before(best)) best = other;
    }
    return best;
  }

  __device__ void remove(int64_t index) {
#pragma unroll
    for (int j = 0; j < Tile::kN; ++j) {
      if (first_column + Tile::column(j) == index) left &= ~(1U << j);
    }
  }
};

// Inserts what a row of a tile has for the list of its row and column of warps. The list belongs to
// the first lane of the row. As long as some row of the warp has one, all lanes stay.
template <typename Tile, typename value_t>
__device__ void merge_row(RowOfLane<Tile, value_t> row, Neighbour<value_t>* list, int64_t k) {
  const int lane = threadIdx.x % kWarp;
  const int owner =
      lane - Tile::kLaneColumnStep * (lane / Tile::kLaneColumnStep % Tile::kLaneColumns);
  const bool owns = Tile::is_first_lane_of_row() && list != nullptr;
  auto last = owns ? list[k - 1] : nobody<value_t>();
  auto own = row.first();
  while (true) {
    last.distance = __shfl_sync(kAllLanes, last.distance, owner);
    last.index = __shfl_sync(kAllLanes, last.index, owner);
    const auto best = first_of_row<Tile>(own);
    const bool is_new = best.is_before(last);
    if (!__any_sync(kAllLanes, is_new)) return;
    if (is_new && owns) last = insert(list, k, best);
    if (is_new && own.index == best.index) {
      row.remove(best.index);
      own = row.first();
    }
  }
}

// What a block reads at every tile.
template <typename value_t>
struct BlockOfRows {
  Neighbour<value_t>* lists;  // of the block's first row
  const bool* present;        // [N] of its task, or null

  // Bit j: this lane's column(j) of the tile at `first` is there and present.
  template <typename Tile>
  __device__ unsigned columns(int64_t first, int64_t count) const {
    unsigned bits = 0;
#pragma unroll
    for (int j = 0; j < Tile::kN; ++j) {
      const int64_t column = first + Tile::column(j);
      if (column < count && (present == nullptr || present[column])) bits |= 1U << j;
    }
    return bits;
  }
};

// indices[q] = the k numbers n of the smallest distances of x[q] and y[n], and these distances.
// x [T, Q, D], y [T, N, D] -> [T, Q, k].
// A block owns a tile's rows of x and walks the tiles of y, so the [Q, N] distances exist a tile at
// a time. Each row and column of warps has a sorted list of the k nearest so far, in global memory,
// where one lane reads and writes it: a tile costs a read of its last entry, and after the first
// tiles few rows insert. At the end a thread merges the lists of a row.
template <typename scalar_t, typename Term, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    nearest_kernel(Metric metric, Rows<scalar_t> x, Rows<scalar_t> y, Found<scalar_t> found) {
  using value_t = acc_t<scalar_t>;
  // In shared memory, as the sums fill the registers.
  __shared__ BlockOfRows<value_t> block;
  const auto tile = tile_position<Tile>(blockIdx.x, x.count, 1);
  const int rows = at_most(Tile::kRows, x.count - tile.row);
  if (threadIdx.x == 0) {
    block.lists = found.lists + (tile.task * x.count + tile.row) * Tile::kWarpColumns * found.k;
    block.present = found.present == nullptr ? nullptr : found.present + tile.task * y.count;
  }
  __syncthreads();
  const auto list_of = [&](int row, int warp_column) {
    return block.lists + (row * Tile::kWarpColumns + warp_column) * found.k;
  };
#pragma unroll
  for (int i = 0; i < Tile::kM; ++i) {
    if (!Tile::is_first_lane_of_row() || Tile::row(i) >= rows) continue;
    auto* list = list_of(Tile::row(i), Tile::warp_column());
    for (int64_t n = 0; n < found.k; ++n) list[n] = nobody<value_t>();
  }

  value_t distances[Tile::kM][Tile::kN];
  for (int64_t first = 0; first < y.count; first += Tile::kColumns) {
    tile_distances<Term>(Tile{}, ordered_by(metric), x.task(tile.task), tile.row, y.task(tile.task),
                         first, distances);
    const unsigned columns = block.template columns<Tile>(first, y.count);
#pragma unroll
    for (int i = 0; i < Tile::kM; ++i) {
      const int row = Tile::row(i);
      merge_row<Tile, value_t>({distances[i], first, columns},
                               row < rows ? list_of(row, Tile::warp_column()) : nullptr, found.k);
    }
  }
  __syncthreads();
  const int row = threadIdx.x;
  if (row >= rows) return;
  // Merges into the first list.
  auto* list = list_of(row, 0);
  for (int w = 1; w < Tile::kWarpColumns; ++w) {
    const auto* other = list_of(row, w);
    for (int64_t n = 0; n < found.k && other[n].is_before(list[found.k - 1]); ++n) {
      insert(list, found.k, other[n]);
    }
  }
  const int64_t target = (tile.task * x.count + tile.row + row) * found.k;
  for (int64_t n = 0; n < found.k; ++n) {
    const bool is_found = list[n].is_before(nobody<value_t>());
    found.indices[target + n] = is_found ? list[n].index : kAbsent;
    found.distances[target + n] =
        narrow<scalar_t>(is_found ? finish_ordered(metric, list[n].distance)
                                  : std::numeric_limits<value_t>::infinity());
  }
}

int64_t count_entries(const NearestOperands& operands) {
  const auto& shape = operands.pairwise.shape;
  return shape.tasks * shape.queries * SmallTile::kWarpColumns * operands.k;
}

static_assert(SmallTile::kWarpColumns == LargeTile::kWarpColumns);

// Parts of the workspace.
struct NearestSpace {
  void* row_norms;
  void* lists;
  int64_t bytes;

  NearestSpace(const NearestOperands& operands, void* workspace) {
    Workspace space(workspace);
    row_norms = space.take<char>(row_norms_bytes(operands.pairwise));
    lists = with_dtype(operands.pairwise.dtype, [&](auto type) -> void* {
      using value_t = acc_t<typename decltype(type)::type>;
      return space.take<Neighbour<value_t>>(count_entries(operands));
    });
    bytes = space.bytes();
  }
};

NearestOperands tiled(NearestOperands operands) {
  const auto& shape = operands.pairwise.shape;
  operands.pairwise.large_tiles =
      uses_large_tiles(operands.pairwise, count_tiles<LargeTile>(shape.tasks, shape.queries, 1));
  return operands;
}

}  // namespace

int64_t nearest_workspace(const NearestOperands& operands) {
  return NearestSpace(tiled(operands), nullptr).bytes;
}

int launch_nearest(NearestOperands operands, void* distances, int64_t* indices, void* workspace,
                   void* stream) {
  operands = tiled(operands);
  auto& pairwise = operands.pairwise;
  const NearestSpace space(operands, workspace);
  const int error = launch_row_norms(pairwise, space.row_norms, stream);
  if (error != cudaSuccess) return error;
  return with_dtype(pairwise.dtype, [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    const Chunk chunk = whole(pairwise.shape);
    const auto x = x_rows<scalar_t>(pairwise, chunk), y = y_rows<scalar_t>(pairwise, chunk);
    const Found<scalar_t> found{operands.present, static_cast<scalar_t*>(distances), indices,
                                static_cast<Neighbour<acc_t<scalar_t>>*>(space.lists), operands.k};
    return with_tile<scalar_t>(pairwise, [&](auto tile) {
      using Tile = decltype(tile);
      return with_term(pairwise.metric, [&](auto term) {
        return launch(nearest_kernel<scalar_t, decltype(term), Tile>,
                      count_tiles<Tile>(chunk.tasks, x.count, 1), Tile::kThreads,
                      Tile::kSharedBytes, static_cast<cudaStream_t>(stream), pairwise.metric, x, y,
                      found);
      });
    });
  });
}

}  // namespace fastmeta
