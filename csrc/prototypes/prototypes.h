// Class means of every task's support embeddings, and the transpose of that linear map.
//
//   prototypes[t, n]  = mean of x[t, s] over the s with labels[t, s] == n, zero without any
//   grad_x[t, s]      = grad_prototypes[t, labels[t, s]] / count[t, labels[t, s]]
//
// An absent example, of label -1, belongs to no class: nothing reads it, and its gradient is zero.
// x [T, S, D], labels [T, S], prototypes [T, N, D], all contiguous. Both maps are linear and each
// is the other's derivative, so these two kernels serve every order. Sums run over s in order, in
// float for bfloat16 and half.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace fastmeta {

struct PrototypesShape {
  int64_t tasks;
  int64_t support;
  int64_t classes;
  int64_t features;
};

// CUDA launchers: device pointers, result a cudaError_t. Labels outside 0 <= label < classes belong
// to no class: such an example adds to no prototype, and its gradient is zero.
int launch_prototypes(Dtype dtype, const PrototypesShape& shape, const void* x,
                      const int64_t* labels, void* prototypes, void* stream);
int launch_prototypes_backward(Dtype dtype, const PrototypesShape& shape,
                               const void* grad_prototypes, const int64_t* labels, void* grad_x,
                               void* stream);

}  // namespace fastmeta
