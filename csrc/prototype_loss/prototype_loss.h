// Loss of prototypical networks (Snell, Swersky, Zemel 2017, eq. 2) and its gradient, fused.
//
//   loss[t, q] = logsumexp_n(-scale d(query[t, q], prototypes[t, n])) + scale d(.., label[t, q])
//
// query [T, Q, D], labels [T, Q], prototypes [T, N, D], all contiguous; d of pairwise_distance.h.
// loss and weight are of the accumulation type: float for bfloat16, half and float.
// The gradient of sum(weight * loss), weight [T, Q], with p = softmax_n(-scale d):
//
//   upstream of d[q, n] = -scale weight[q] (p[q, n] - [n == label[q]])
//
// goes through the weighted sums of pairwise_distance.h. The [Q, N] matrix exists a block of rows
// at a time, so memory beyond inputs and outputs is O(N D).
//
// An absent query, of label -1, has loss 0 and upstream 0, whatever its weight is.
#pragma once

#include "common/absent.h"
#include "common/host_device.h"
#include "pairwise_distance/operands.h"
#include "pairwise_distance/row_loss.h"

namespace fastmeta {

template <typename value_t>
FASTMETA_HOST_DEVICE inline value_t distance_upstream(value_t scale, value_t weight,
                                                      value_t probability, bool is_label) {
  return loss_upstream(scale, weight, probability - value_t(is_label ? 1 : 0));
}

// CUDA launchers: device pointers, at least one query, workspace of as many bytes as the function
// before returns, result a cudaError_t. W exists a chunk of bounded size at a time. A label that is
// neither 0 <= label < N nor absent makes the loss of its query NaN, and so every gradient that
// depends on the query.
struct LossOperands {
  PairwiseOperands pairwise;  // x: query, y: prototypes
  const int64_t* labels;
  double scale;
};

int64_t prototype_loss_workspace(const LossOperands& operands);
int launch_prototype_loss(LossOperands operands, void* loss, void* workspace, void* stream);

int64_t prototype_loss_backward_workspace(const LossOperands& operands);
int launch_prototype_loss_backward(LossOperands operands, const void* weight, void* loss,
                                   void* grad_query, void* grad_prototypes, void* workspace,
                                   void* stream);

}  // namespace fastmeta
