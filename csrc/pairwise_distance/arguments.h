// Argument checks of the ops that compare rows of x with rows of y.
#pragma once

#include <string_view>

#include "common/check.h"
#include "pairwise_distance/pairwise_distance.h"

namespace fastmeta {

inline Metric checked_metric(std::string_view name) {
  const auto metric = metric_named(name);
  TORCH_CHECK_VALUE(metric.has_value(),
                    "metric: expected sqeuclidean, euclidean, cosine or dot, got ", name);
  return *metric;
}

inline PairwiseShape checked_pairwise_shape(const at::Tensor& x, const at::Tensor& y) {
  check_dims(x, 3, "x");
  check_dims(y, 3, "y");
  check_same(x, y, "x and y");
  TORCH_CHECK(x.size(0) == y.size(0) && x.size(2) == y.size(2),
              "x and y: expected [T, Q, D] and [T, N, D] with the same T and D, got ", x.sizes(),
              " and ", y.sizes());
  return {x.size(0), x.size(1), y.size(1), x.size(2)};
}

}  // namespace fastmeta
