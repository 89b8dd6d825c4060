// Checks of classification labels, on the CPU.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>

namespace fastmeta {

// Raises ValueError for the first of labels [T, B] that is outside lowest <= label < classes and is
// not to be ignored. Tasks may share their labels: a stride of 0.
inline void check_class_labels(const at::Tensor& labels, int64_t lowest, int64_t classes,
                               int64_t ignored, const char* name) {
  const int64_t tasks =
      labels.stride(0) == 0 ? std::min<int64_t>(1, labels.size(0)) : labels.size(0);
  const int64_t* label = labels.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < tasks * labels.size(1); ++i) {
    TORCH_CHECK_VALUE(label[i] == ignored || (label[i] >= lowest && label[i] < classes), name,
                      ": expected labels in 0..", classes - 1, ", as the module gives ", classes,
                      " outputs, got ", label[i]);
  }
}

}  // namespace fastmeta
