// CUDA's half, with torch's conversions and, as there, no constructor; see cuda_bf16.h.
#pragma once

#include <c10/util/Half.h>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half x) { return c10::Half(x.bits, c10::Half::from_bits()); }
inline __half __float2half(float x) { return {c10::Half(x).x}; }
