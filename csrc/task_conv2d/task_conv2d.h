// CUDA launcher of the ops of convolution.
#pragma once

#include "common/dtype.h"
#include "execution/executor.h"

namespace fastmeta {

// Bytes of workspace of launch_task_conv() on the current device.
int64_t task_conv_workspace(Dtype dtype);

// Launches a convolution of arrays of `dtype` in device memory. tf32: whether float operands may be
// rounded to 10 bits of mantissa. Returns a cudaError_t.
int launch_task_conv(Dtype dtype, const Convolution<void>& c, int64_t tasks, bool tf32,
                     void* workspace, void* stream);

}  // namespace fastmeta
