// target[i] += sum over tasks of source[t, i], in the order of tasks: what tasks share gets its
// gradient so.
#pragma once

#include <cstdint>

namespace fastmeta {

// source: rows of n numbers, task_stride apart. For float and double. Returns a cudaError_t.
template <typename value_t>
int launch_sum_over_tasks(int64_t tasks, int64_t n, const value_t* source, int64_t task_stride,
                          value_t* target, void* stream);

}  // namespace fastmeta
