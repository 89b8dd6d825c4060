// Matrix products of a warp in tensor cores: D [16, 8] += A [16, k] B [k, 8], TF32 (k = 8).
//
// With g = lane / 4 and t = lane % 4 a lane has
//   of A  [g, t], [g + 8, t], [g, t + 4], [g + 8, t + 4]        of B  [t, g], [t + 4, g]
//   of D  [g, 2 t], [g, 2 t + 1], [g + 8, 2 t], [g + 8, 2 t + 1]
// Behind each instruction stands a twin in plain C++, for a C++ compiler and its emulated warp.
#pragma once

#include <cstdint>

#include "common/reduce.cuh"

namespace fastmeta {

// A float with 10 bits of mantissa, rounded to the nearest, as its bits.
using Tf32 = uint32_t;

#ifndef FASTMETA_EMULATED

__device__ inline Tf32 to_tf32(float x) {
  Tf32 bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

__device__ inline void multiply_add(float& d0, float& d1, float& d2, float& d3, const Tf32 (&a)[4],
                                    const Tf32 (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d0), "+f"(d1), "+f"(d2), "+f"(d3)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#else

__device__ inline Tf32 to_tf32(float x) {
  constexpr Tf32 kDropped = (1U << 13) - 1, kHalf = 1U << 12;
  const auto bits = std::bit_cast<Tf32>(x);
  return std::isfinite(x) ? (bits + kHalf) & ~kDropped : bits;
}

__device__ inline void multiply_add(float& d0, float& d1, float& d2, float& d3, const Tf32 (&a)[4],
                                    const Tf32 (&b)[2]) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  for (int k = 0; k < 8; ++k) {
    float row[2], column[2];
    for (int half = 0; half < 2; ++half) {
      const Tf32 left = __shfl_sync(kAllLanes, a[k / 4 * 2 + half], g * 4 + k % 4);
      const Tf32 right = __shfl_sync(kAllLanes, b[k / 4], (2 * t + half) * 4 + k % 4);
      row[half] = std::bit_cast<float>(left);
      column[half] = std::bit_cast<float>(right);
    }
    d0 += row[0] * column[0];
    d1 += row[0] * column[1];
    d2 += row[1] * column[0];
    d3 += row[1] * column[1];
  }
}

#endif

}  // namespace fastmeta
