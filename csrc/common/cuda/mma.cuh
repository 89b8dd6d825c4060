// Tensor-core products of a warp: D [16, 8] += A [16, k] B [k, 8], of float rounded to TF32 (k = 8)
// or of a half type (k = 16); D is float.
//
// A word is a number of TF32, or two neighbours in k of a half type; a row of A and a column of B
// have 8 words. With g = lane / 4 and t = lane % 4 a lane owns the words
// of A  [g, t], [g + 8, t], [g, t + 4], [g + 8, t + 4]        of B  [t, g], [t + 4, g]
// and of D the numbers [g, 2 t], [g, 2 t + 1], [g + 8, 2 t], [g + 8, 2 t + 1].
// Each instruction has a twin in plain C++, for a C++ compiler and its emulated warp.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/cuda/copy.cuh"
#include "common/cuda/reduce.cuh"

namespace fastmeta {

inline constexpr int kMmaWords = 8;

template <typename value_t>
struct MmaWord {
  uint32_t bits;
};

template <typename half_t>
__device__ inline MmaWord<half_t> mma_word(const Pack<half_t, 2>& two) {
  MmaWord<half_t> word;
  // A cast would break strict aliasing.
  std::memcpy(&word, &two, sizeof(word));
  return word;
}

#ifndef FASTMETA_EMULATED

// Rounds a float to 10 bits of mantissa, to the nearest.
__device__ inline MmaWord<float> mma_word(const Pack<float, 1>& x) {
  MmaWord<float> word;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(word.bits) : "f"(x[0]));
  return word;
}

// D is both input and output: sums stay in registers.
#define FASTMETA_MMA(shape_and_types)                                                            \
  asm volatile("mma.sync.aligned." shape_and_types                                               \
               " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                \
               : "+f"(d0), "+f"(d1), "+f"(d2), "+f"(d3)                                          \
               : "r"(a[0].bits), "r"(a[1].bits), "r"(a[2].bits), "r"(a[3].bits), "r"(b[0].bits), \
                 "r"(b[1].bits))

template <typename value_t>
__device__ inline void multiply_add(float& d0, float& d1, float& d2, float& d3,
                                    const MmaWord<value_t> (&a)[4],
                                    const MmaWord<value_t> (&b)[2]) {
  if constexpr (std::is_same_v<value_t, float>) {
    FASTMETA_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
  } else if constexpr (std::is_same_v<value_t, __half>) {
    FASTMETA_MMA("m16n8k16.row.col.f32.f16.f16.f32");
  } else {
    FASTMETA_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
  }
}

#undef FASTMETA_MMA

#else

__device__ inline MmaWord<float> mma_word(const Pack<float, 1>& x) {
  constexpr uint32_t kDropped = (1U << 13) - 1, kHalf = 1U << 12;
  const auto bits = std::bit_cast<uint32_t>(x[0]);
  // Ties away from zero, like cvt.rna; rounding must not turn an infinity into NaN.
  return {std::isfinite(x[0]) ? (bits + kHalf) & ~kDropped : bits};
}

// Number i of a lane's word.
template <typename value_t>
__device__ inline float number_of(MmaWord<value_t> word, int lane, int i) {
  // The instruction reads other lanes' words; its twin has to ask for them.
  const auto bits = __shfl_sync(kAllLanes, word.bits, lane);
  Pack<value_t, kInWord<value_t> > numbers;
  std::memcpy(&numbers, &bits, sizeof(bits));
  return widen(numbers[i]);
}

template <typename value_t>
__device__ inline void multiply_add(float& d0, float& d1, float& d2, float& d3,
                                    const MmaWord<value_t> (&a)[4],
                                    const MmaWord<value_t> (&b)[2]) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  for (int k = 0; k < kMmaWords * kInWord<value_t>; ++k) {
    const int word = k / kInWord<value_t>, i = k % kInWord<value_t>;
    float row[2], column[2];
    for (int half = 0; half < 2; ++half) {
      row[half] = number_of(a[word / 4 * 2 + half], g * 4 + word % 4, i);
      column[half] = number_of(b[word / 4], (2 * t + half) * 4 + word % 4, i);
    }
    d0 += row[0] * column[0];
    d1 += row[0] * column[1];
    d2 += row[1] * column[0];
    d3 += row[1] * column[1];
  }
}

#endif

}  // namespace fastmeta
