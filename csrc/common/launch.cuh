// What a plain header cannot express: how a kernel starts, and dynamic shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>

namespace fastmeta {

// The dynamic shared memory of the running block.
template <typename value_t>
__device__ value_t* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char fastmeta_dynamic_shared[];
  return reinterpret_cast<value_t*>(fastmeta_dynamic_shared);
}

// Enqueues `blocks` blocks in one dimension, where 2^31 - 1 are allowed; none for 0 blocks.
template <typename... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes,
                   cudaStream_t stream, std::type_identity_t<Parameters>... arguments) {
  constexpr size_t kSharedWithoutConsent = 48 * 1024;
  if (blocks == 0) return cudaSuccess;
  if (blocks > std::numeric_limits<int>::max()) return cudaErrorInvalidConfiguration;
  if (shared_bytes > kSharedWithoutConsent) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, stream>>>(arguments...);
  return cudaGetLastError();
}

}  // namespace fastmeta
