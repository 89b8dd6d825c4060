// Sums of matrix products in the shared memory of a block.
#pragma once

#include "common/cuda/copy.cuh"
#include "common/cuda/launch.cuh"
#include "common/cuda/reduce.cuh"
#include "task_program/cuda/block_steps.cuh"

namespace fastmeta {

// An operand [outers, k], or [k, outers].
template <typename value_t, bool along_k, bool wide>
struct BlockOperand {
  const value_t* data;
  int outers, k;

  // Loads x[s][i] = element (first + i, at + s); past the end it repeats the last one.
  template <int kSteps, int kSide>
  __device__ void read(int first, int at, value_t (&x)[kSteps][kSide]) const {
    if constexpr (along_k) {
#pragma unroll
      for (int i = 0; i < kSide; ++i) {
        const int outer = first + i < outers ? first + i : outers - 1;
        if constexpr (wide && kSteps > 1) {
          const auto steps = as_packs<kSteps>(data)[(outer * k + at) / kSteps];
#pragma unroll
          for (int s = 0; s < kSteps; ++s) x[s][i] = steps[s];
        } else {
#pragma unroll
          for (int s = 0; s < kSteps; ++s) x[s][i] = data[outer * k + at + s];
        }
      }
    } else {
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        if constexpr (wide) {
          const auto side = as_packs<kSide>(data)[((at + s) * outers + first) / kSide];
#pragma unroll
          for (int i = 0; i < kSide; ++i) x[s][i] = side[i];
        } else {
#pragma unroll
          for (int i = 0; i < kSide; ++i) {
            const int outer = first + i < outers ? first + i : outers - 1;
            x[s][i] = data[(at + s) * outers + outer];
          }
        }
      }
    }
  }
};

template <int kSteps, int kSide, typename value_t, typename A, typename B>
__device__ void add_steps(const A& a, const B& b, int row, int column, int k,
                          value_t (&sum)[kSide][kSide]) {
  value_t left[kSteps][kSide], right[kSteps][kSide];
  a.read(row, k, left);
  b.read(column, k, right);
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
#pragma unroll
    for (int i = 0; i < kSide; ++i) {
#pragma unroll
      for (int j = 0; j < kSide; ++j) sum[i][j] += left[s][i] * right[s][j];
    }
  }
}

inline constexpr int kBlockSteps = 4;  // steps of k at a time
inline constexpr int kSplitLanes = 4;

// Assignment of elements of C to threads: 4 x 4 if each thread then gets a tile, else 2 x 2, whose
// sum 4 neighbouring lanes share if threads suffice.
struct BlockTiles {
  int m, n, side, lanes, column_tiles, tiles;

  __device__ explicit BlockTiles(const BlockProduct& p) : m(p.m), n(p.n) {
    const int threads = blockDim.x;
    // Larger tiles read less, but must not leave threads idle.
    side = (m + 3) / 4 * ((n + 3) / 4) >= threads ? 4 : 2;
    column_tiles = (n + side - 1) / side;
    tiles = (m + side - 1) / side * column_tiles;
    lanes = side == 2 && tiles * kSplitLanes <= threads && p.k > kBlockSteps ? kSplitLanes : 1;
  }
  __device__ int lane() const { return static_cast<int>(threadIdx.x) % lanes; }
  // Tile of this thread in the block's round that begins at tile * lane `first`.
  __device__ int tile(int first) const { return (first + static_cast<int>(threadIdx.x)) / lanes; }
  __device__ int row(int tile) const { return tile / column_tiles * side; }
  __device__ int column(int tile) const { return tile % column_tiles * side; }
  __device__ bool owns(int tile, int i, int r, int c) const {
    return tile < tiles && i % lanes == lane() && r < m && c < n;
  }
};

template <typename value_t, Form form, int kSide, bool wide>
__device__ void block_tiles(const BlockProduct& p, const BlockTiles& t) {
  auto* numbers = dynamic_shared<value_t>();
  // Subtracting step_size times the sum is adding it with a negative factor.
  const value_t factor = p.step_size < 0 ? value_t(1) : -numbers[p.step_size];
  for (int first = 0; first < t.tiles * t.lanes; first += blockDim.x) {
    const int tile = t.tile(first), row = t.row(tile), column = t.column(tile);
    value_t sum[kSide][kSide] = {};
    // Threads without a tile still take part in the shuffles below.
    for (int pair = 0; pair < p.pairs && tile < t.tiles; ++pair) {
      const BlockOperand<value_t, form != Form::kTN, wide> a{numbers + p.a[pair], p.m, p.k};
      const BlockOperand<value_t, form == Form::kNT, wide> b{numbers + p.b[pair], p.n, p.k};
      int k = t.lane() * kBlockSteps;  // a lane takes every lanes-th run of steps
#pragma unroll 1
      for (; k + kBlockSteps <= p.k; k += t.lanes * kBlockSteps) {
        add_steps<kBlockSteps>(a, b, row, column, k, sum);
      }
#pragma unroll 1
      // Only the lane whose turn the last, partial run is enters here.
      for (; k < p.k; ++k) add_steps<1>(a, b, row, column, k, sum);
    }
    if (t.lanes > 1) {
#pragma unroll
      for (int i = 0; i < kSide * kSide; ++i) {
        value_t& x = sum[i / kSide][i % kSide];
        for (int offset = kSplitLanes / 2; offset > 0; offset /= 2) {
          // A butterfly: all lanes get the same sum, and then share the stores.
          x += __shfl_xor_sync(kAllLanes, x, offset);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kSide * kSide; ++i) {
      const int r = row + i / kSide, c = column + i % kSide;
      if (!t.owns(tile, i, r, c)) continue;
      value_t& target = numbers[p.c + r * p.n + c];
      // With a step size p.adds is set, so `before` is the parameter.
      value_t before = 0;
      if (p.adds) {
        before = target;
      } else if (p.bias >= 0) {
        before = numbers[p.bias + c];
      }
      target = before + factor * sum[i / kSide][i % kSide];
    }
  }
}

// Calls body(index) for the elements of C that this thread made.
template <typename Body>
__device__ void for_own_elements(const BlockProduct& p, const Body& body) {
  const BlockTiles t(p);
  for (int first = 0; first < t.tiles * t.lanes; first += blockDim.x) {
    const int tile = t.tile(first);
#pragma unroll 1
    for (int i = t.lane(); i < t.side * t.side; i += t.lanes) {
      const int r = t.row(tile) + i / t.side, c = t.column(tile) + i % t.side;
      if (t.owns(tile, i, r, c)) body(r * p.n + c);
    }
  }
}

// Whether operands can be read several numbers at a time.
template <Form form>
__device__ bool is_wide(const BlockProduct& p, int side) {
  const int a_row = form == Form::kTN ? p.m % side : p.k % kBlockSteps;
  const int b_row = form == Form::kNT ? p.k % kBlockSteps : p.n % side;
  int rest = a_row | b_row;
  for (int pair = 0; pair < p.pairs; ++pair) rest |= (p.a[pair] | p.b[pair]) % kBlockSteps;
  return rest == 0;
}

template <typename value_t, Form form, int kSide>
__device__ void block_form(const BlockProduct& p, const BlockTiles& t) {
  if (is_wide<form>(p, kSide)) {
    block_tiles<value_t, form, kSide, true>(p, t);
  } else {
    block_tiles<value_t, form, kSide, false>(p, t);
  }
}

template <typename value_t, int kSide>
__device__ void block_side(const BlockProduct& p, const BlockTiles& t) {
  switch (p.form) {
    case Form::kNT:
      return block_form<value_t, Form::kNT, kSide>(p, t);
    case Form::kNN:
      return block_form<value_t, Form::kNN, kSide>(p, t);
    case Form::kTN:
      return block_form<value_t, Form::kTN, kSide>(p, t);
  }
}

// Chooses reads of 4 numbers at a time (for a 2 x 2 tile: 2, across k) if operands are aligned.
template <typename value_t>
__device__ void block_product(const BlockProduct& p) {
  const BlockTiles t(p);
  if (t.side == 4) {
    block_side<value_t, 4>(p, t);
  } else {
    block_side<value_t, 2>(p, t);
  }
}

}  // namespace fastmeta
