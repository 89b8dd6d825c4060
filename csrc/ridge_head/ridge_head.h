// Ridge regression of every task, in closed form, and its gradient.
//
//   W, b = argmin  sum_s w_s |W x_s + b - y_s|^2 + l2 |W|^2
//
// x [T, S, D], y [T, S, N], weight w [T, S] of at least 0, l2 [T] of at least 0 -> head W [T, N, D],
// intercept b [T, N], all contiguous. With X the rows sqrt(w_s) (x_s - mean of x), Y likewise, and
// means by w (0 without a bias), W = Y' A^-1 X:
//   dual     A = X X' + l2 [S, S], coefficients C' = A^-1 Y, W = C X
//   primal   A = X' X + l2 [D, D], W' = A^-1 X' Y
// b = mean of y - W mean of x. `factor` is the upper U with A = U' U, zero below its diagonal.
//
// Gradient, for upstream G to W and g to b. Let m be the mean of x, w~ = sum of w, P = G - g m'
// (G without a bias), V' = (X' X + l2)^-1 P', and for each example, moved to the means
//   r_s = y_s - W x_s                 z_s = V x_s + g / w~
//   grad_y_s = w_s z_s                grad_weight_s = <r_s, z_s>
//   grad_x_s = w_s (V' r_s - W' z_s)  grad_l2 = -<V, W>
// In the dual form U_d = A^-1 X P' gives them without a division by l2, which may be small:
//   w_s r_s = l2 sqrt(w_s) C'_s       w_s V x_s = sqrt(w_s) U_d,s      l2 V = P - U_d' X
//
// With l2 = 0 the dual A has a null space that Y and X P' have no part in: an absent example, whose
// pivot is then 1, and with a bias the vector sqrt(w), along which A gets the mean of its diagonal.
//
// A task whose A is singular, which l2 = 0 allows, has no W: a pivot is no more than its rounding.
// On a CPU that raises ValueError; a CUDA kernel cannot, and the task's results are NaN.
#pragma once

#include <cstdint>
#include <limits>

#include "common/dtype.h"
#include "common/host_device.h"

namespace fastmeta {

struct RidgeShape {
  int64_t tasks, examples, ways, features;
  bool bias, dual;

  FASTMETA_HOST_DEVICE int64_t unknowns() const { return dual ? examples : features; }
};

// Inputs of both passes, and what the forward pass leaves to the backward pass: factor [T, n, n],
// coefficients C [T, N, S], which only the dual form has.
struct RidgeOperands {
  const void *x, *y, *weight, *l2;
  void *head, *intercept, *factor, *coefficients;
};

struct RidgeGradients {
  const void *upstream_head, *upstream_intercept;
  void *x, *y, *weight, *l2;
};

// The least pivot that is more than rounding, of a diagonal element of A.
template <typename value_t>
FASTMETA_HOST_DEVICE value_t least_pivot(value_t diagonal, int64_t unknowns) {
  return diagonal * std::numeric_limits<value_t>::epsilon() * static_cast<value_t>(unknowns);
}

// CUDA launchers: device pointers, workspace of as many bytes as the function before returns,
// result a cudaError_t. float32 and float64.
int64_t ridge_head_workspace(Dtype dtype, const RidgeShape& shape);
int launch_ridge_head(Dtype dtype, const RidgeShape& shape, const RidgeOperands& operands,
                      void* workspace, void* stream);

int64_t ridge_head_backward_workspace(Dtype dtype, const RidgeShape& shape);
int launch_ridge_head_backward(Dtype dtype, const RidgeShape& shape, const RidgeOperands& operands,
                               const RidgeGradients& gradients, void* workspace, void* stream);

}  // namespace fastmeta
