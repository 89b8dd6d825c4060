// What the current device has.
#pragma once

#include <cuda_runtime.h>

namespace fastmeta {

// `otherwise` where there is no device; what is launched then says so.
inline int device_attribute(cudaDeviceAttr attribute, int otherwise) {
  int device = 0, value = otherwise;
  if (cudaGetDevice(&device) == cudaSuccess) cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

// How many tiles are enough to keep it busy.
inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount, 1); }

// Bytes that a block can have.
inline int largest_shared_memory() {
  return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, 48 * 1024);
}

}  // namespace fastmeta
