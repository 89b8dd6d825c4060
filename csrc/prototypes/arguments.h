// Argument checks of prototypes on every device.
#pragma once

#include "common/check.h"
#include "prototypes/prototypes.h"

namespace fastmeta {

inline PrototypesShape checked_prototypes_shape(const at::Tensor& x, const at::Tensor& labels,
                                                int64_t num_classes) {
  check_dims(x, 3, "x");
  check_labels(labels, x, "labels");
  check_shape(labels, x.sizes().slice(0, 2), "labels");
  TORCH_CHECK(num_classes >= 0, "num_classes: expected at least 0, got ", num_classes);
  return {x.size(0), x.size(1), num_classes, x.size(2)};
}

inline PrototypesShape checked_prototypes_backward_shape(const at::Tensor& grad_prototypes,
                                                         const at::Tensor& labels) {
  check_dims(grad_prototypes, 3, "grad_prototypes");
  check_labels(labels, grad_prototypes, "labels");
  check_dims(labels, 2, "labels");
  TORCH_CHECK(labels.size(0) == grad_prototypes.size(0), "labels: expected ",
              grad_prototypes.size(0), " tasks, got ", labels.size(0));
  return {grad_prototypes.size(0), labels.size(1), grad_prototypes.size(1),
          grad_prototypes.size(2)};
}

}  // namespace fastmeta
