// Executor on the host: every step is one launch for all tasks. Arrays are in global memory, a
// task's from data + task * task_stride on.
#pragma once

#include <algorithm>

#include "common/cuda/multiprocessors.cuh"
#include "common/cuda/tf32.h"
#include "convolution/cuda/depthwise.cuh"
#include "convolution/cuda/launch.cuh"
#include "convolution/cuda/tensor_sums.cuh"
#include "execution/cuda/grid_images.cuh"

namespace fastmeta {

inline constexpr int kStepThreads = 256;

// Calls f(accessor) for elements of all tasks, neighbours in neighbouring threads.
template <typename value_t, typename F>
__global__ void __launch_bounds__(kStepThreads) map_kernel(int64_t tasks, int64_t n, F f) {
  const int64_t step = int64_t(gridDim.x) * kStepThreads;
  // A loop with a stride of the grid: the number of blocks is bounded by kMostBlocks.
  for (int64_t i = int64_t(blockIdx.x) * kStepThreads + threadIdx.x; i < tasks * n; i += step) {
    f(GlobalAccessor<value_t>{i / n, i % n});
  }
}

// Calls f(group, row) for rows of all tasks; a warp owns a row.
template <typename value_t, typename F>
__global__ void __launch_bounds__(kStepThreads) rows_kernel(int64_t tasks, int64_t n, F f) {
  const int64_t row = int64_t(blockIdx.x) * (kStepThreads / kWarp) + threadIdx.x / kWarp;
  if (row >= tasks * n) return;
  f(GlobalThreadGroup<value_t>(threadIdx.x % kWarp, row / n), row % n);
}

// target[0] += sum of f(accessor). A block owns a task; a thread sums, then a warp, then the
// block.
template <typename value_t, typename F>
__global__ void __launch_bounds__(kStepThreads)
    reduce_kernel(int64_t n, F f, Array<value_t> target) {
  const int64_t task = blockIdx.x;
  value_t sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += kStepThreads) {
    sum += f(GlobalAccessor<value_t>{task, i});
  }
  sum = block_sum<kStepThreads>(sum);
  if (threadIdx.x == 0) target.data[task * target.task_stride] += sum;
}

template <typename value_t>
class GridExecutor {
 public:
  using storage_t = value_t;
  static constexpr bool kCompilesEachActivation = false, kHasImages = true;
  static constexpr bool kHasFusedBands = false;

  // Numbers of partial sums that steps need.
  static int64_t part_numbers() {
    return multiprocessors() *
           std::max({kMostPartsOfMultiprocessor, kMostConvolutionParts, kMostImageParts});
  }

  GridExecutor(int64_t tasks, acc_t<value_t>* parts, cudaStream_t stream, Tf32 tf32)
      : tasks_(tasks),
        multiprocessors_(multiprocessors()),
        parts_(parts),
        stream_(stream),
        tf32_(tf32) {}

  // Error of the first launch that failed; no launch follows it.
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
    // Few rows, as of a linear layer on few examples: a larger tile would compute mostly zeros.
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

  template <typename Finish>
  void convolution(const Convolution<value_t>& c, const Finish& finish) {
    const bool has_moments = c.shape.is_depthwise() ? depthwise(c, finish) : dense(c, finish);
    if constexpr (!is_reduced<value_t>) {  // programs, which want moments, have no half types
      if (c.moments && !has_moments) column_moments(c.outputs(), true, c.c, c.moments);
    }
  }

  template <typename F>
  void table(const Images& images, const F& f) {
    if (!holds(images)) return;
    ImageGrid g(images, true);
    // Elements need no merge, so blocks may be as many as the device wants.
    g.split_into(std::min(positions_of_block(g), kTablePositions * g.rows()));
    start(table_kernel<value_t, F>, g.blocks(tasks_), kImageThreads, g, f);
  }

  template <typename F>
  void column_sums(const Images& images, bool whole_batch, const F& f,
                   const Array<value_t>& target) {
    columns<ChannelSums<value_t>>(images, whole_batch, f, target);
  }

  void column_moments(const Images& images, bool whole_batch, const Array<value_t>& x,
                      const Array<value_t>& target) {
    columns<ChannelMoments<value_t>>(images, whole_batch, NumbersOf<value_t>{images, x}, target);
  }

 private:
  static constexpr int64_t kMostBlocks = 1 << 20;
  static constexpr int64_t kTablePositions = 8;   // at most, for each thread
  static constexpr int64_t kSplitPositions = 16;  // of a thread, enough to repay a block

  template <typename... Parameters>
  void start(void (*kernel)(Parameters...), int64_t blocks, int threads,
             std::type_identity_t<Parameters>... arguments) {
    if (error_ != cudaSuccess) return;
    error_ = launch(kernel, blocks, threads, 0, stream_, arguments...);
  }

  template <typename Tile, typename Finish>
  void product_in(const Product<value_t>& p, const Finish& finish) {
    constexpr bool has_warp_rows = Tile::kRows >= 8 * Tile::kM;  // a skinny tile has none
    if constexpr (std::is_same_v<value_t, float> && has_warp_rows) {
      using Deep = DeepTile<Tile, float>;
      if (tf32_.products) return product_by<TensorSums<float, Deep>, Deep>(p, finish);
    }
    product_by<ThreadSums<value_t, Tile>, Tile>(p, finish);
  }

  template <typename Sums, typename Tile, typename Finish>
  void product_by(const Product<value_t>& p, const Finish& finish) {
    static_assert(Tile::kBlocks == 1 ||
                  Tile::kBlocks * Tile::kRows * Tile::kColumns <= kMostPartsOfMultiprocessor);
    auto g = in_tiles<Tile>(p);
    const int64_t tiles = tasks_ * g.row_tiles * g.column_tiles;
    // Only then: the sum of parts costs a launch.
    if (tiles < multiprocessors_) split_sums(g, tiles, multiprocessors_ * Tile::kBlocks, parts_);
    start(product_kernel<Sums, Tile, value_t, Finish>, tiles * g.splits, Tile::kThreads, g, finish);
    if (g.splits > 1) map(p.m * p.n, SumOfParts<value_t, Finish>{g, finish});
  }

  bool holds(const Images& images) {
    if (error_ == cudaSuccess && !ImageGrid::has(images)) error_ = cudaErrorInvalidValue;
    return error_ == cudaSuccess;
  }

  // Launches a convolution; each overload returns whether it has made the moments.
  template <typename Finish>
  bool depthwise(const Convolution<value_t>& c, const Finish& finish) {
    const int64_t height = c.shape.out_height(), width = c.shape.out_width();
    if (c.to == MapTo::kWeight) {
      rows(c.size(), DepthwiseWeight<value_t, Finish>{c, height, width, finish});
    } else {
      map(c.size(), DepthwiseImage<value_t, Finish>{c, height, width, finish});
    }
    return false;
  }

  template <typename Finish>
  bool dense(const Convolution<value_t>& c, const Finish& finish) {
    if (error_ != cudaSuccess) return false;
    const auto done =
        launch_convolution(c, tasks_, multiprocessors_, parts_, tf32_.convolutions, stream_);
    error_ = done.error;
    if (done.g.splits > 1) {
      const bool to_weight = c.to == MapTo::kWeight;
      map(c.size(), SumOfConvolution<value_t, Finish>{done.g, to_weight ? c.shape.channels : 1,
                                                      to_weight ? c.shape.taps() : 1, finish});
      return false;
    }
    if constexpr (!is_reduced<value_t>) {
      if (done.moments) rows(done.g.p.n, MomentsOfTiles<value_t>{done, c.moments});
    }
    if constexpr (!std::is_same_v<Finish, NoFinish>) map(c.size(), finish);
    return static_cast<bool>(done.moments);
  }

  // Positions of a block: every multiprocessor gets enough blocks if sets are large enough.
  int64_t positions_of_block(const ImageGrid& g) const {
    const int64_t splits = multiprocessors_ * kImageBlocks / std::max<int64_t>(1, g.blocks(tasks_));
    return ceil_div(g.set_positions, std::max<int64_t>(1, splits));
  }

  template <typename Sums, typename F>
  void columns(const Images& images, bool whole_batch, const F& f, const Array<value_t>& target) {
    if (!holds(images)) return;
    ImageGrid g(images, whole_batch);
    g.split_into(std::max(positions_of_block(g), kSplitPositions * g.rows()));
    const bool in_parts = g.splits > 1;
    // A target's sets have 4 numbers a channel, see executor.h; parts only the 2 sums.
    const int64_t stride = (in_parts ? 2 : 4) * images.channels;
    const Array<value_t> parts{parts_, g.sets * g.splits * stride};
    start(column_kernel<value_t, Sums, F>, g.blocks(tasks_), kImageThreads, g, f,
          in_parts ? parts : target, stride);
    if (in_parts) map(g.sets * images.channels, SumOfImageParts<value_t, Sums>{g, parts, target});
  }

  int64_t tasks_, multiprocessors_;
  acc_t<value_t>* parts_;
  cudaStream_t stream_;
  Tf32 tf32_;
  cudaError_t error_ = cudaSuccess;
};

}  // namespace fastmeta
