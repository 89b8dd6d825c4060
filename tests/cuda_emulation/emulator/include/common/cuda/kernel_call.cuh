// The emulator's twin of csrc/common/cuda/kernel_call.cuh.
#pragma once

#include <cuda_runtime.h>

#include "launch_facts.h"

namespace fastmeta {

template <typename value_t>
value_t* dynamic_shared() {
  return static_cast<value_t*>(emulator::dynamic_shared_memory());
}

template <typename... Parameters>
cudaError_t call_kernel(void (*kernel)(Parameters...), unsigned blocks, int threads,
                        size_t shared_bytes, cudaStream_t stream, Parameters... arguments) {
  const cudaError_t error =
      emulator::launch({reinterpret_cast<const void*>(kernel), blocks, threads, shared_bytes,
                        stream, (emulator::facts_of(arguments) + ...)},
                       [&] { kernel(arguments...); });
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

}  // namespace fastmeta
