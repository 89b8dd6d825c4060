// CUDA launcher of the ops of convolution.
#pragma once

#include "common/dtype.h"
#include "execution/executor.h"

namespace fastmeta {

// Bytes that launch_task_conv() needs on the current device.
int64_t task_conv_workspace(Dtype dtype);

// Of arrays of `dtype` in device memory; tf32: whether operands that are float may be rounded to 10
// bits of mantissa. The result is a cudaError_t.
int launch_task_conv(Dtype dtype, const Convolution<void>& c, int64_t tasks, bool tf32,
                     void* workspace, void* stream);

}  // namespace fastmeta
