// CUDA's bfloat16, with torch's conversions.
#pragma once

#include <c10/util/BFloat16.h>

struct __nv_bfloat16 {
  c10::BFloat16 value;
};

inline float __bfloat162float(__nv_bfloat16 x) { return x.value; }
inline __nv_bfloat16 __float2bfloat16(float x) { return {c10::BFloat16(x)}; }
