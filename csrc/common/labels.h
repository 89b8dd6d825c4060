// Range check of labels in CPU tensors, shared by every op with labels.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace fastmeta {

// Raises ValueError for the first entry of labels [T, E] outside 0 <= label < classes.
inline void check_label_range(const at::Tensor& labels, int64_t classes, const char* name) {
  const int64_t* label = labels.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < labels.numel(); ++i) {
    TORCH_CHECK_VALUE(label[i] >= 0 && label[i] < classes, name, "[", i / labels.size(1), ", ",
                      i % labels.size(1), "] is ", label[i], ", expected 0 <= label < ", classes);
  }
}

}  // namespace fastmeta
