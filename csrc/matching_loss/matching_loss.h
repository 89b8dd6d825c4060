// Loss of matching networks (Vinyals et al. 2016, eq. 1), of neighbourhood components analysis
// without the query itself (Goldberger et al. 2004), and its gradient, fused.
//
//   a[t, q, s] = -scale d(query[t, q], support[t, s])
//   loss[t, q] = logsumexp_s a[t, q, s] - logsumexp_{s: labels equal} a[t, q, s]
//
// query [T, Q, D], query_labels [T, Q], support [T, S, D], support_labels [T, S], all contiguous; d
// of pairwise_distance.h. loss and weight are of the accumulation type: float for bfloat16, half and
// float. The gradient of sum(weight * loss), weight [T, Q], with p the softmax of a over all s, and r
// over the ones of the query's class (0 elsewhere):
//
//   upstream of d[q, s] = -scale weight[q] (p[q, s] - r[q, s])
//
// goes through the weighted sums of pairwise_distance.h. The [Q, S] matrix exists a block of rows
// at a time, so memory beyond inputs and outputs is O(S D).
//
// An absent query, of label -1, has loss 0 and upstream 0. No query sees an absent support. With
// exclude_self (Q = S) query q does not see support q. A query that sees no support of its class has
// an infinite loss, and r = 0.
#pragma once

#include "common/absent.h"
#include "pairwise_distance/operands.h"

namespace fastmeta {

// CUDA launchers: device pointers, at least one query and support, workspace of as many bytes as the
// function before returns, result a cudaError_t. W exists a chunk of bounded size at a time. A label
// below -1 makes the loss NaN: of its query, or of all queries that see the support.
struct MatchingOperands {
  PairwiseOperands pairwise;  // x: query, y: support
  const int64_t* labels;      // of queries
  const int64_t* support_labels;
  double scale;
  bool exclude_self;
};

int64_t matching_loss_workspace(const MatchingOperands& operands);
int launch_matching_loss(MatchingOperands operands, void* loss, void* workspace, void* stream);

int64_t matching_loss_backward_workspace(const MatchingOperands& operands);
int launch_matching_loss_backward(MatchingOperands operands, const void* weight, void* loss,
                                  void* grad_query, void* grad_support, void* workspace,
                                  void* stream);

}  // namespace fastmeta
