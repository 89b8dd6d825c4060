// Kernel launches.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "common/cuda/kernel_call.cuh"

namespace fastmeta {

// Enqueues `blocks` blocks in one dimension, the one that allows 2^31 - 1; launches nothing for 0
// blocks.
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
    if (error != cudaSuccess) {
      cudaGetLastError();  // as in call_kernel()
      return error;
    }
  }
  return call_kernel<Parameters...>(kernel, static_cast<unsigned>(blocks), threads, shared_bytes,
                                    stream, arguments...);
}

}  // namespace fastmeta
