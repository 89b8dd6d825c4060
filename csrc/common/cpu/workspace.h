// Workspaces of CPU kernels.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace fastmeta {

// Returns at least `bytes` of memory, kept for this thread's next call unless that is more than
// FASTMETA_WORKSPACE_MB. Pages new to the process cost a small call as much time as its arithmetic;
// for images of 84 x 84 they took a fifth of the time.
at::Tensor workspace(int64_t bytes);

// Bytes that may be kept: FASTMETA_WORKSPACE_MB, or 1 GiB. Raises ValueError if it is no number.
int64_t most_kept();

// Gives back the memory that the threads keep, and returns how many bytes that is. What a call has
// in use is freed when it ends.
int64_t release_workspaces();

}  // namespace fastmeta
