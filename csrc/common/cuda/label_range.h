// Labels on a GPU: whether any is out of range.
#pragma once

#include <cstdint>

namespace fastmeta {

inline constexpr int kLabelRangeParts = 64;

// Sets bad[part] to whether the part of labels [count] holds one outside 0 <= label < classes; all
// parts together are all labels. Returns a cudaError_t.
int launch_label_range(const int64_t* labels, int64_t count, int64_t classes, int* bad,
                       void* stream);

}  // namespace fastmeta
