#pragma once

#include <cuda_runtime.h>

namespace fastmeta {

// Of the current device: how many tiles are enough to keep it busy. 1 where there is none; what is
// launched then says so.
inline int multiprocessors() {
  int device = 0, count = 1;
  if (cudaGetDevice(&device) == cudaSuccess) {
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  }
  return count;
}

}  // namespace fastmeta
