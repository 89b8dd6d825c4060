// Base of the thread groups in which a warp shares a row.
#pragma once

#include "common/cuda/reduce.cuh"

namespace fastmeta {

template <typename value_t>
struct WarpThreadGroup {
  using number_t = value_t;
  static constexpr int size = kWarp;
  int lane;

  __device__ value_t sum(value_t x) const { return warp_sum(x); }
  __device__ value_t larger(value_t x) const {
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      const value_t other = __shfl_xor_sync(kAllLanes, x, offset);
      x = x < other ? other : x;
    }
    return x;
  }
};

}  // namespace fastmeta
