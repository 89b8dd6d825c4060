// Argument checks of matching_loss on every device.
#pragma once

#include <algorithm>

#include "common/check.h"
#include "common/labels.h"
#include "pairwise_distance/arguments.h"

namespace fastmeta {

inline PairwiseShape checked_matching_shape(const at::Tensor& query, const at::Tensor& query_labels,
                                            const at::Tensor& support,
                                            const at::Tensor& support_labels, bool exclude_self) {
  const PairwiseShape shape = checked_pairwise_shape(query, support);
  check_labels(query_labels, query, "query_labels");
  check_labels(support_labels, query, "support_labels");
  check_shape(query_labels, query.sizes().slice(0, 2), "query_labels");
  check_shape(support_labels, support.sizes().slice(0, 2), "support_labels");
  TORCH_CHECK(!exclude_self || shape.queries == shape.classes,
              "exclude_self: expected as many queries as supports, got ", shape.queries, " and ",
              shape.classes);
  return shape;
}

// Raises ValueError for the first query whose class has no support that it sees. Labels [T, Q] and
// [T, S] of a CPU, contiguous.
inline void check_classes_of_queries(const at::Tensor& query_labels,
                                     const at::Tensor& support_labels, bool exclude_self) {
  const int64_t queries = query_labels.size(1), supports = support_labels.size(1);
  const int64_t* label = query_labels.const_data_ptr<int64_t>();
  const int64_t* of_task = support_labels.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < query_labels.size(0); ++t, of_task += supports) {
    for (int64_t q = 0; q < queries; ++q, ++label) {
      if (*label == kAbsent) continue;
      const int64_t* end = of_task + supports;
      const int64_t* found = std::find(of_task, end, *label);
      if (exclude_self && found == of_task + q) found = std::find(found + 1, end, *label);
      TORCH_CHECK_VALUE(found != end, "query_labels[", t, ", ", q, "] is ", *label,
                        ", expected a class with a support example",
                        exclude_self ? " other than the query itself" : "", " in this task, or ",
                        kAbsent);
    }
  }
}

}  // namespace fastmeta
