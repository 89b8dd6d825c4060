// Argument checks of nearest on every device.
#pragma once

#include <optional>

#include "common/check.h"
#include "pairwise_distance/arguments.h"

namespace fastmeta {

inline PairwiseShape checked_nearest_shape(const at::Tensor& x, const at::Tensor& y,
                                           const std::optional<at::Tensor>& present, int64_t k) {
  const PairwiseShape shape = checked_pairwise_shape(x, y);
  TORCH_CHECK_VALUE(k >= 1 && k <= shape.classes, "k: expected 1 to ", shape.classes, ", got ", k);
  if (present.has_value()) {
    check_shape(*present, {shape.tasks, shape.classes}, "present");
    TORCH_CHECK(present->scalar_type() == at::kBool && present->device() == x.device(),
                "present: expected bool on ", x.device(), ", got ", present->scalar_type(), " on ",
                present->device());
  }
  return shape;
}

}  // namespace fastmeta
