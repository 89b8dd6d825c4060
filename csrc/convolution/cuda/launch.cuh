// Convolutions of all tasks with one launch each; tasks' arrays as in execution/executor.h.
#pragma once

#include "execution/cuda/grid_images.cuh"
#include "execution/cuda/grid_product.cuh"
#include "execution/elementwise.h"

namespace fastmeta {

// A launched convolution as a product; the kernels are compiled in convolution.cu.
template <typename value_t>
struct LaunchedConvolution {
  GridProduct<value_t> g;         // if g.splits > 1, SumOfConvolution makes C of the parts
  Array<acc_t<value_t>> moments;  // [row tiles, 2, n] of the sums, if wanted and splits are 1
  int64_t tile_rows;
  cudaError_t error;
};

// Numbers for partial sums, for each multiprocessor.
inline constexpr int64_t kMostConvolutionParts = 3 * 128 * 64;

// Launches a convolution with groups 1. parts: kMostConvolutionParts numbers for each
// multiprocessor; tf32: whether float operands may be rounded to 10 bits of mantissa.
template <typename value_t>
LaunchedConvolution<value_t> launch_convolution(const Convolution<value_t>& c, int64_t tasks,
                                                int64_t multiprocessors, acc_t<value_t>* parts,
                                                bool tf32, cudaStream_t stream);

// Moments of a channel of z. A row is a channel, whose thread group shares the tiles.
template <typename value_t>
struct MomentsOfTiles {
  LaunchedConvolution<value_t> done;
  Array<value_t> target;

  __device__ void operator()(const GlobalThreadGroup<value_t>& group, int64_t channel) const {
    const auto& p = done.g.p;
    ChannelMoments<value_t> moments{};
    for (int64_t tile = group.lane; tile < done.g.row_tiles; tile += group.size) {
      const int64_t rest = p.m - tile * done.tile_rows, place = tile * 2 * p.n + channel;
      moments.merge(ChannelMoments<value_t>::of(rest < done.tile_rows ? rest : done.tile_rows,
                                                group.load(done.moments, place),
                                                group.load(done.moments, place + p.n)));
    }
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      moments.merge({__shfl_down_sync(kAllLanes, moments.first, offset),
                     __shfl_down_sync(kAllLanes, moments.second, offset),
                     __shfl_down_sync(kAllLanes, moments.count, offset)});
    }
    if (group.lane != 0) return;
    const value_t bias = p.bias ? group.load(p.bias, channel) : value_t(0);
    group.store(target, channel, moments.first + bias);
    group.store(target, channel + p.n, moments.second);
  }
};

// Adds up the parts of an element of C, then finish. Parts of weights are [O, taps, C], their
// memory [O, C, taps].
template <typename value_t, typename Finish>
struct SumOfConvolution {
  GridProduct<value_t> g;
  int64_t channels, taps;  // of weights; else all columns, and 1
  Finish finish;

  __device__ void operator()(const GlobalAccessor<value_t>& at) const {
    const auto& p = g.p;
    const int64_t row = at.index / p.n, column = at.index % p.n;
    const int64_t place = row * p.n + column % taps * channels + column / taps;
    acc_t<value_t> sum = p.bias ? at.load_one(p.bias, column) : 0;
    for (int64_t s = 0; s < g.splits; ++s) sum += at.load_one(g.parts, s * p.m * p.n + place);
    store_sum(at, p.c, p.into, sum);
    finish(at);
  }
};

}  // namespace fastmeta
