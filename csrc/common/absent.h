// The label of an example that a task lacks, in a batch of tasks of unequal size.
#pragma once

#include <cstdint>

namespace fastmeta {

// Such an example belongs to no class, enters no sum and no mean, and its gradient is zero.
inline constexpr int64_t kAbsent = -1;

}  // namespace fastmeta
