// The emulator's twin of csrc/common/cuda/kernel_call.cuh.
#pragma once

#include <cuda_runtime.h>

namespace fastmeta {

template <typename value_t>
value_t* dynamic_shared() {
  return static_cast<value_t*>(emulator::dynamic_shared_memory());
}

template <typename... Parameters>
void call_kernel(void (*kernel)(Parameters...), unsigned blocks, int threads, size_t shared_bytes,
                 cudaStream_t stream, Parameters... arguments) {
  emulator::launch(reinterpret_cast<const void*>(kernel), blocks, threads, shared_bytes, stream,
                   [&] { kernel(arguments...); });
}

}  // namespace fastmeta
