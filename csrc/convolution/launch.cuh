// Convolutions of all tasks with one launch each; tasks' arrays as in task_program/executor.h.
#pragma once

#include "task_program/elementwise.h"
#include "task_program/grid_product.cuh"

namespace fastmeta {

// A convolution as the product that a launch made of it; the kernels are compiled in convolution.cu.
template <typename value_t>
struct LaunchedConvolution {
  GridProduct<value_t> g;  // where g.splits > 1, SumOfConvolution is to make C of the parts
  cudaError_t error;
};

// Numbers for parts of sums, of each multiprocessor.
inline constexpr int64_t kMostConvolutionParts = 3 * 128 * 64;

// Of groups 1. parts: kMostConvolutionParts numbers for each multiprocessor.
template <typename value_t>
LaunchedConvolution<value_t> launch_convolution(const Convolution<value_t>& c, int64_t tasks,
                                                int64_t multiprocessors, value_t* parts,
                                                cudaStream_t stream);

// An element of C and what follows it, from parts of its sum. Those of weights, in memory
// [O, C, taps], are [O, taps, C].
template <typename value_t, typename Finish>
struct SumOfConvolution {
  GridProduct<value_t> g;
  int64_t channels, taps;  // of weights; else all columns, and 1
  Finish finish;

  __device__ void operator()(const GlobalCell<value_t>& at) const {
    const auto& p = g.p;
    const int64_t row = at.index / p.n, column = at.index % p.n;
    const int64_t place = row * p.n + column % taps * channels + column / taps;
    value_t sum = p.bias ? at.load_one(p.bias, column) : value_t(0);
    for (int64_t s = 0; s < g.splits; ++s) sum += at.load_one(g.parts, s * p.m * p.n + place);
    store_sum(at, p.c, p.into, sum);
    finish(at);
  }
};

}  // namespace fastmeta
