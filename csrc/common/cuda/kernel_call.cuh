// Kernel launch and dynamic shared memory, the two things of CUDA that a C++ compiler cannot read.
// tests/cuda_emulation replaces only this header.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

namespace fastmeta {

// The dynamic shared memory of the running block.
template <typename value_t>
__device__ value_t* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char fastmeta_dynamic_shared[];
  return reinterpret_cast<value_t*>(fastmeta_dynamic_shared);
}

// Returns the error of this launch: cudaGetLastError() after <<<>>> would also tell of one that
// another library left behind.
template <typename... Parameters>
cudaError_t call_kernel(void (*kernel)(Parameters...), unsigned blocks, int threads,
                        size_t shared_bytes, cudaStream_t stream, Parameters... arguments) {
  void* addresses[] = {&arguments...};
  const cudaError_t error =
      cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(blocks),
                       dim3(static_cast<unsigned>(threads)), addresses, shared_bytes, stream);
  // Our caller reports it; whoever asks next must not find it again.
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

}  // namespace fastmeta
