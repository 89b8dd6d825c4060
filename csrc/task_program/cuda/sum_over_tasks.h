// target[i] += sum over tasks of source[t, i], in the order of tasks: the gradient of values that
// tasks share.
#pragma once

#include <cstdint>

namespace fastmeta {

// Launches the sum for float and double; source: rows of n numbers, task_stride apart. Returns a
// cudaError_t.
template <typename value_t>
int launch_sum_over_tasks(int64_t tasks, int64_t n, const value_t* source, int64_t task_stride,
                          value_t* target, void* stream);

}  // namespace fastmeta
