// Attributes of the current device.
#pragma once

#include <cuda_runtime.h>

namespace fastmeta {

// Reads an attribute; returns `otherwise` without a device, and the launch that follows reports the
// error.
inline int device_attribute(cudaDeviceAttr attribute, int otherwise) {
  int device = 0, value = otherwise;
  if (cudaGetDevice(&device) == cudaSuccess) cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

// Multiprocessors: as many tiles keep the device busy.
inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount, 1); }

// Most bytes of shared memory of a block.
inline int largest_shared_memory() {
  return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, 48 * 1024);
}

}  // namespace fastmeta
