// Sums over a warp and a block, in a fixed order.
#pragma once

#include "common/cuda/launch.cuh"

namespace fastmeta {

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffffU;

// Sums over a warp; every lane gets the sum.
template <typename value_t>
__device__ value_t warp_sum(value_t x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    x += __shfl_xor_sync(kAllLanes, x, offset);
  }
  return x;
}

// Sums over a block of kThreads threads, all of which call this once; thread 0 gets the sum.
template <int kThreads, typename value_t>
__device__ value_t block_sum(value_t x) {
  constexpr int kWarps = kThreads / kWarp;
  static_assert(kThreads % kWarp == 0 && kWarps <= kWarp);
  __shared__ value_t warp_sums[kWarps];
  x = warp_sum(x);
  if (threadIdx.x % kWarp == 0) warp_sums[threadIdx.x / kWarp] = x;
  __syncthreads();
  if (threadIdx.x >= kWarp) return 0;
  return warp_sum(threadIdx.x < kWarps ? warp_sums[threadIdx.x] : value_t(0));
}

}  // namespace fastmeta
