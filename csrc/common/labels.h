// Range check of labels in CPU tensors, shared by every op with labels.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <limits>

#include "common/absent.h"

namespace fastmeta {

// The number of classes of labels that are only compared with each other.
inline constexpr int64_t kAnyLabel = std::numeric_limits<int64_t>::max();

// Raises ValueError for the first entry of labels [T, E] that is neither 0 <= label < classes nor
// kAbsent. Returns whether some entry is absent.
inline bool check_label_range(const at::Tensor& labels, int64_t classes, const char* name) {
  const int64_t* label = labels.const_data_ptr<int64_t>();
  bool has_absent = false;
  for (int64_t i = 0; i < labels.numel(); ++i) {
    if (label[i] >= 0 && label[i] < classes) continue;
    TORCH_CHECK_VALUE(label[i] == kAbsent, name, "[", i / labels.size(1), ", ", i % labels.size(1),
                      "] is ", label[i], ", expected ",
                      classes == kAnyLabel ? "label >= 0" : c10::str("0 <= label < ", classes),
                      " or ", kAbsent, " for an absent example");
    has_absent = true;
  }
  return has_absent;
}

// Returns x [T, E, D] with zeros for the absent examples: a NaN there must not reach any product.
inline at::Tensor without_absent(const at::Tensor& x, const at::Tensor& labels) {
  return x.masked_fill(labels.eq(kAbsent).unsqueeze(-1), 0);
}

}  // namespace fastmeta
