// Packs: several values in one memory access.
//
// Kernels index arrays of packs, not of values, and copy whole packs. For a pack at a value pointer
// plus an offset, or behind a reference, nvcc made as many accesses as the pack has values.
#pragma once

#include <cstdint>

#include "common/cuda/scalar.cuh"
#include "common/host_device.h"

namespace fastmeta {

inline constexpr int kAccessBytes = 16;  // bytes in the widest access of a thread

template <typename value_t>
inline constexpr int kAccess = kAccessBytes / sizeof(value_t);  // values in the widest access

template <typename value_t, int n>
struct alignas(n * sizeof(value_t) < kAccessBytes ? n * sizeof(value_t) : kAccessBytes) Pack {
  value_t value[n];
  FASTMETA_HOST_DEVICE value_t& operator[](int i) { return value[i]; }
  FASTMETA_HOST_DEVICE const value_t& operator[](int i) const { return value[i]; }
};

// Views an array of values as packs of n; the address must be aligned like a pack.
template <int n, typename value_t>
FASTMETA_HOST_DEVICE const Pack<value_t, n>* as_packs(const value_t* values) {
  return reinterpret_cast<const Pack<value_t, n>*>(values);
}

template <int n, typename value_t>
FASTMETA_HOST_DEVICE Pack<value_t, n>* as_packs(value_t* values) {
  return reinterpret_cast<Pack<value_t, n>*>(values);
}

template <typename scalar_t, int n>
__device__ Pack<acc_t<scalar_t>, n> widen(Pack<scalar_t, n> x) {
  Pack<acc_t<scalar_t>, n> wide;
#pragma unroll
  for (int i = 0; i < n; ++i) wide[i] = widen(x[i]);
  return wide;
}

template <typename scalar_t, int n>
__device__ Pack<scalar_t, n> narrow(Pack<acc_t<scalar_t>, n> x) {
  Pack<scalar_t, n> raw;
#pragma unroll
  for (int i = 0; i < n; ++i) raw[i] = narrow<scalar_t>(x[i]);
  return raw;
}

// Whether rows of `length` values, `stride` values apart, consist of whole, aligned accesses.
template <typename value_t>
bool has_wide_rows(const value_t* data, int64_t length, int64_t stride) {
  return reinterpret_cast<uintptr_t>(data) % kAccessBytes == 0 && length % kAccess<value_t> == 0 &&
         stride % kAccess<value_t> == 0;
}

}  // namespace fastmeta
