#pragma once

#include "runtime.h"

namespace c10::cuda {

class CUDAStream {
 public:
  cudaStream_t stream() const { return stream_; }

 private:
  cudaStream_t stream_ = emulator::current_stream();
};

inline CUDAStream getCurrentCUDAStream() { return {}; }

}  // namespace c10::cuda
