// Range check of labels on a GPU.
#pragma once

#include <cstdint>

namespace fastmeta {

inline constexpr int kLabelRangeParts = 64;

// Sets bad[part] if a label of this part of labels [count] is outside lowest <= label < classes; the
// parts together cover all labels. Returns a cudaError_t.
int launch_label_range(const int64_t* labels, int64_t count, int64_t lowest, int64_t classes,
                       int* bad, void* stream);

}  // namespace fastmeta
