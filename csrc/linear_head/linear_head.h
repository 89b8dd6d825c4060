// K steps of gradient descent on a linear head of every task, in two forms, and their adjoint.
//
// x [T, S, D], weight [T, N, D], bias [T, N] or none, lr [T, K], decay w. With Z_k = X W_k' + b_k and
// G_k the gradient of the mean loss over a task's examples to Z_k, a step is
//
//   W_{k+1} = (1 - lr_k w) W_k - lr_k G_k' X       b_{k+1} = (1 - lr_k w) b_k - lr_k sum_s G_k
//
// A head never leaves the span of its start and its examples: with coefficients C_k [S, N], C_0 = 0,
//
//   C_{k+1} = (1 - lr_k w) C_k - lr_k G_k          c_{k+1} = (1 - lr_k w) c_k,  c_0 = 1
//   W_k = c_k W + C_k' X                           b_k = c_k b + sum_s C_k
//   Z_k = c_k Z_0 + (X X' + 1) C_k                 (the 1 is the bias; it goes without one)
//
// "dual" forms X X' once, so that a step takes S^2 N operations whatever D is; "primal" forms
// P_k = C_k' X [N, D] and X P_k' at every step.
// The adjoint, for upstream V of W_K and v of b_K, from R = X V' + v, the adjoint of C_K, down:
//
//   Y_k = J_k (-lr_k R)                            J_k = dG_k / dZ_k, symmetric
//   d lr_k = -<R, G_k + w C_k> - w c_k e           e = <V, W> + <v, b>, the adjoint of c_K
//   R <- (1 - lr_k w) R + (X X' + 1) Y_k           e <- (1 - lr_k w) e + <Y_k, Z_0>
//   d W = c_K V + Y' X, d b = c_K v + sum_s Y      with Y = sum_k c_k Y_k
//   d X = Y W + C_K V + sum_k (Y_k C_k' + C_k Y_k') X
//   d targets = -sum_k Y_k                         (mean squared error)
//
// An absent example, of label -1, has G_k = 0 and J_k = 0, and means are over the others.
//
// The sum in d X is an [S, S] matrix in the dual, and in the primal Y_k P_k + C_k Q_k with
// Q_k = Y_k' X. To first order all Y_k are 0, and nothing goes to x and targets.
//
// Kept from forward to backward: predictions p_k [T, K, N, S] (softmax, sigmoid or outputs), which
// G_k = f (p_k - y) and J_k follow from, and products: X X' + 1 [T, S, S] or P_1 .. P_K [T, K, N, D].
// All but x, targets, heads and their gradients is of the accumulation type.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/host_device.h"

namespace fastmeta {

enum class HeadLoss { kCrossEntropy, kMse, kLogistic };

struct LinearHeadShape {
  int64_t tasks;
  int64_t support;
  int64_t ways;
  int64_t features;
  int64_t steps;
};

struct LinearHeadOptions {
  HeadLoss loss;
  double weight_decay;
  bool dual;
  bool has_bias;
};

// Factor f in G = f (p - y): the loss is a mean over examples, of squares over all their outputs.
// A task of which `present` examples are there, fewer than `support`, has another one.
inline double residual_factor(HeadLoss loss, const LinearHeadShape& shape, int64_t present) {
  const auto examples = static_cast<double>(present);
  if (present == 0) return 0;
  return loss == HeadLoss::kMse ? 2 / (examples * static_cast<double>(shape.ways)) : 1 / examples;
}

// Device pointers of the CUDA kernels, each task's part contiguous; weights of tasks are
// weight_stride apart.
struct LinearHeadOperands {
  Dtype dtype;
  LinearHeadShape shape;
  LinearHeadOptions options;
  const void *x, *weight, *bias, *lr;
  int64_t weight_stride;
  const int64_t* labels;  // or null
  const void* targets;    // or null
  void *predictions, *products;
};

struct LinearHeadUpstream {
  const void *weight, *bias;
  bool first_order;
};

struct LinearHeadGradients {
  void *x, *weight, *bias, *lr, *targets;  // null if absent
};

// Launchers, for at least one task; workspace of as many bytes as the function before returns,
// result a cudaError_t. A label that is neither in range nor absent makes its task's whole head
// NaN, and the gradients too.
int64_t linear_head_workspace(const LinearHeadOperands& operands);
int launch_linear_head(const LinearHeadOperands& operands, void* weight, void* bias,
                       void* workspace, void* stream);

int64_t linear_head_backward_workspace(const LinearHeadOperands& operands);
int launch_linear_head_backward(const LinearHeadOperands& operands,
                                const LinearHeadUpstream& upstream,
                                const LinearHeadGradients& gradients, void* workspace,
                                void* stream);

}  // namespace fastmeta
