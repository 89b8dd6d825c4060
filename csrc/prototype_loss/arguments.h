// Argument checks of prototype_loss on every device, except the range of labels.
#pragma once

#include "common/check.h"
#include "pairwise_distance/arguments.h"

namespace fastmeta {

inline PairwiseShape checked_loss_shape(const at::Tensor& query, const at::Tensor& labels,
                                        const at::Tensor& prototypes) {
  const PairwiseShape shape = checked_pairwise_shape(query, prototypes);
  check_labels(labels, query, "query_labels");
  check_shape(labels, query.sizes().slice(0, 2), "query_labels");
  return shape;
}

}  // namespace fastmeta
