// CUDA's half, with torch's conversions.
#pragma once

#include <c10/util/Half.h>

struct __half {
  c10::Half value;
};

inline float __half2float(__half x) { return x.value; }
inline __half __float2half(float x) { return {c10::Half(x)}; }
