// Accumulation type of CUDA kernels, acc_t: float for bfloat16, half and float; double for double.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "common/dtype.h"

namespace fastmeta {

template <typename scalar_t>
using acc_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

template <typename scalar_t>
inline constexpr bool is_reduced = !std::is_same_v<scalar_t, acc_t<scalar_t>>;

// Numbers in a word of 32 bits, the width of a bank of shared memory and of an operand of tensor
// cores.
template <typename scalar_t>
inline constexpr int kInWord = is_reduced<scalar_t> ? 2 : 1;

template <typename scalar_t>
__device__ acc_t<scalar_t> widen(scalar_t x) {
  if constexpr (std::is_same_v<scalar_t, __half>) {
    return __half2float(x);
  } else if constexpr (std::is_same_v<scalar_t, __nv_bfloat16>) {
    return __bfloat162float(x);
  } else {
    return x;
  }
}

template <typename scalar_t>
__device__ scalar_t narrow(acc_t<scalar_t> x) {
  if constexpr (std::is_same_v<scalar_t, __half>) {
    return __float2half(x);
  } else if constexpr (std::is_same_v<scalar_t, __nv_bfloat16>) {
    return __float2bfloat16(x);
  } else {
    return x;
  }
}

template <typename scalar_t>
struct ScalarType {
  using type = scalar_t;
};

// Calls body(ScalarType<scalar_t>) for the element type of `dtype`.
template <typename Body>
auto with_dtype(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::kDouble:
      return body(ScalarType<double>{});
    case Dtype::kHalf:
      return body(ScalarType<__half>{});
    case Dtype::kBfloat16:
      return body(ScalarType<__nv_bfloat16>{});
    case Dtype::kFloat:
      break;
  }
  // Behind the switch, so that every path returns.
  return body(ScalarType<float>{});
}

}  // namespace fastmeta
