// One step of gradient descent for every task at once, and its derivative.
//
//   out[t, p]        = params[t, p] - lr[t, p] * grads[t, p]
//   grad_grads[t, p] = -lr[t, p] * grad_out[t, p]
//   grad_lr          = sum of -grads[t, p] * grad_out[t, p] over the (t, p) that share a step size
//                                                   (grad_params is grad_out itself)
//
// lr is a [T, P] array given by two strides, 0 along a dimension that shares it: one number (0, 0),
// [P] per element (0, 1), [T, 1] per task (1, 0), [T, P] (P, 1). params and grads have contiguous
// rows, `*_stride` apart (0: all tasks share the row). lr is of the accumulation type: float for
// bfloat16, half and float, double for double.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/host_device.h"

namespace fastmeta {

struct InnerUpdateShape {
  int64_t tasks;
  int64_t parameters;
  int64_t params_stride;  // forward: params; backward: grad_out
  int64_t grads_stride;
  int64_t lr_task_stride;
  int64_t lr_parameter_stride;
};

template <typename value_t>
FASTMETA_HOST_DEVICE inline value_t descend(value_t param, value_t grad, value_t lr) {
  return param - lr * grad;
}

// CUDA launchers: device pointers, shape with at least one task and parameter, result a
// cudaError_t.
int launch_inner_update(Dtype dtype, const InnerUpdateShape& shape, const void* params,
                        const void* grads, const void* lr, void* out, void* stream);

int64_t inner_update_backward_workspace(Dtype dtype, const InnerUpdateShape& shape);  // bytes
int launch_inner_update_backward(Dtype dtype, const InnerUpdateShape& shape, const void* grad_out,
                                 const void* grads, const void* lr, void* grad_grads, void* grad_lr,
                                 void* workspace, void* stream);

}  // namespace fastmeta
