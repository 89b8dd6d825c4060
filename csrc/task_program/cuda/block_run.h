// A job as one kernel, a block a task, where a task fits into a block's shared memory. Files of each
// number type: block_float.cu, block_double.cu.
#pragma once

#include <cstdint>

#include "task_program/job.h"

namespace fastmeta {

// Bytes of workspace; -1 where a task does not fit.
template <typename value_t>
int64_t block_workspace(const Job& job);

template <typename value_t>
int launch_blocks(const Job& job, void* workspace, void* stream);

}  // namespace fastmeta
