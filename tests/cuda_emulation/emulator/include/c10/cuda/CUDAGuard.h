#pragma once

#include <c10/core/Device.h>

#include "runtime.h"

namespace c10::cuda {

// Makes the device of a tensor current, and then the one before again.
class CUDAGuard {
 public:
  explicit CUDAGuard(Device) {
    cudaGetDevice(&before_);
    cudaSetDevice(emulator::device_of_tensors());
  }
  ~CUDAGuard() { cudaSetDevice(before_); }
  CUDAGuard(const CUDAGuard&) = delete;
  CUDAGuard& operator=(const CUDAGuard&) = delete;

 private:
  int before_ = 0;
};

}  // namespace c10::cuda
