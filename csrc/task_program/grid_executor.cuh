// The executor that is the host: every step is one launch for all tasks. Arrays are in global
// memory, a task's from data + task * task_stride on.
#pragma once

#include <algorithm>

#include "common/multiprocessors.cuh"
#include "task_program/grid_product.cuh"

namespace fastmeta {

inline constexpr int kStepThreads = 256;

// f(cell) for elements of all tasks, neighbours in neighbouring threads.
template <typename value_t, typename F>
__global__ void __launch_bounds__(kStepThreads) map_kernel(int64_t tasks, int64_t n, F f) {
  const int64_t step = int64_t(gridDim.x) * kStepThreads;
  for (int64_t i = int64_t(blockIdx.x) * kStepThreads + threadIdx.x; i < tasks * n; i += step) {
    f(GlobalCell<value_t>{i / n, i % n});
  }
}

// f(team, row) for rows of all tasks: a warp takes one.
template <typename value_t, typename F>
__global__ void __launch_bounds__(kStepThreads) rows_kernel(int64_t tasks, int64_t n, F f) {
  const int64_t row = int64_t(blockIdx.x) * (kStepThreads / kWarp) + threadIdx.x / kWarp;
  if (row >= tasks * n) return;
  f(GlobalTeam<value_t>(threadIdx.x % kWarp, row / n), row % n);
}

// target[0] += sum of f(cell): a block takes a task. Thread, warp, then block sum.
template <typename value_t, typename F>
__global__ void __launch_bounds__(kStepThreads)
    reduce_kernel(int64_t n, F f, Array<value_t> target) {
  const int64_t task = blockIdx.x;
  value_t sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += kStepThreads) {
    sum += f(GlobalCell<value_t>{task, i});
  }
  sum = block_sum<kStepThreads>(sum);
  if (threadIdx.x == 0) target.data[task * target.task_stride] += sum;
}

template <typename value_t>
class GridExecutor {
 public:
  using storage_t = value_t;
  static constexpr bool kCompilesEachActivation = false;

  // Numbers that products need for parts of sums.
  static int64_t part_numbers() { return multiprocessors() * kMostPartsOfMultiprocessor; }

  GridExecutor(int64_t tasks, value_t* parts, cudaStream_t stream)
      : tasks_(tasks), multiprocessors_(multiprocessors()), parts_(parts), stream_(stream) {}

  // Of the first launch that failed; none follow it.
  cudaError_t error() const { return error_; }

  template <typename F>
  void map(int64_t n, const F& f) {
    const int64_t blocks = ceil_div(tasks_ * n, kStepThreads);
    start(map_kernel<value_t, F>, std::min(blocks, kMostBlocks), kStepThreads, tasks_, n, f);
  }

  template <typename F>
  void rows(int64_t n, const F& f) {
    const int64_t blocks = ceil_div(tasks_ * n, kStepThreads / kWarp);
    start(rows_kernel<value_t, F>, blocks, kStepThreads, tasks_, n, f);
  }

  template <typename F>
  void reduce(int64_t n, const F& f, const Array<value_t>& target) {
    start(reduce_kernel<value_t, F>, tasks_, kStepThreads, n, f, target);
  }

  template <typename Finish>
  void product(const Product<value_t>& p, const Finish& finish) {
    if (p.m <= SkinnyProduct<value_t>::kRows) {
      product_in<SkinnyProduct<value_t>>(p, finish);
      return;
    }
    if constexpr (std::is_same_v<value_t, float>) {  // for double the registers do not suffice
      const auto large = in_tiles<LargeProduct>(p);
      const bool fills = p.m > LargeProduct::kRows / 2 && p.n > LargeProduct::kColumns / 2;
      if (fills && large.row_tiles * large.column_tiles * tasks_ >= multiprocessors_) {
        product_in<LargeProduct>(p, finish);
        return;
      }
    }
    product_in<SmallProduct>(p, finish);
  }

 private:
  static constexpr int64_t kMostBlocks = 1 << 20;
  static constexpr int64_t kSplitSlices = 4;  // worth a block

  template <typename... Parameters>
  void start(void (*kernel)(Parameters...), int64_t blocks, int threads,
             std::type_identity_t<Parameters>... arguments) {
    if (error_ != cudaSuccess) return;
    error_ = launch(kernel, blocks, threads, 0, stream_, arguments...);
  }

  template <typename Tile>
  static GridProduct<value_t> in_tiles(const Product<value_t>& p) {
    const int64_t slices = ceil_div(p.k, Tile::kDepth) * p.pairs;
    return {p, ceil_div(p.m, Tile::kRows), ceil_div(p.n, Tile::kColumns), 1, slices, {}};
  }

  template <typename Tile, typename Finish>
  void product_in(const Product<value_t>& p, const Finish& finish) {
    static_assert(Tile::kBlocks == 1 ||
                  Tile::kBlocks * Tile::kRows * Tile::kColumns <= kMostPartsOfMultiprocessor);
    auto g = in_tiles<Tile>(p);
    const int64_t tiles = tasks_ * g.row_tiles * g.column_tiles;
    if (tiles < multiprocessors_) {
      const int64_t wanted = multiprocessors_ * Tile::kBlocks / std::max<int64_t>(1, tiles);
      const int64_t most = std::max<int64_t>(1, g.split_slices / kSplitSlices);
      g.split_slices = ceil_div(g.split_slices, std::min(wanted, most));
      g.splits = std::max<int64_t>(
          1, ceil_div(ceil_div(p.k, Tile::kDepth) * p.pairs, std::max<int64_t>(1, g.split_slices)));
      g.parts = {parts_, g.splits * p.m * p.n};
    }
    start(product_kernel<value_t, Tile, Finish>, tiles * g.splits, Tile::kThreads, g, finish);
    if (g.splits > 1) map(p.m * p.n, SumOfParts<value_t, Finish>{g, finish});
  }

  int64_t tasks_, multiprocessors_;
  value_t* parts_;
  cudaStream_t stream_;
  cudaError_t error_ = cudaSuccess;
};

}  // namespace fastmeta
