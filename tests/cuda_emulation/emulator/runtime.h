// The CUDA runtime as far as launchers and bindings use it: two devices that share the CPU's
// memory, streams that finish what they are given at once, and a record of every launch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorLaunchOutOfResources = 701,
  cudaErrorLaunchFailure = 719,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};

struct EmulatedStream {
  int device;
};
using cudaStream_t = EmulatedStream*;

cudaError_t cudaGetLastError();  // and forgets it
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

namespace emulator {

struct Launch {
  const void* kernel;
  unsigned blocks;
  int threads;
  size_t shared_bytes;
  cudaStream_t stream;
  std::string facts;  // of the arguments, for the record
};

// What cudaLaunchKernel() does.
cudaError_t launch(const Launch& launch, const std::function<void()>& thread);

cudaStream_t current_stream();  // of the current device
int device_of_tensors();        // the device whose memory the CPU's tensors are taken for
bool is_capturing();
int64_t task_bytes();  // of all tasks that a program runs at a time
int64_t chunk();       // numbers in an array of a gradient of distances, at a time

}  // namespace emulator
