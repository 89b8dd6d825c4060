// CUDA's bfloat16, with torch's conversions; as there, an array of them in shared memory has no
// constructor to run, which torch's own would have.
#pragma once

#include <c10/util/BFloat16.h>

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) {
  return c10::BFloat16(x.bits, c10::BFloat16::from_bits());
}
inline __nv_bfloat16 __float2bfloat16(float x) { return {c10::BFloat16(x).x}; }
