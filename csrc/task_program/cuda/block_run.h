// A call as one kernel, a block a task, if a task fits into a block's shared memory. Files of each
// number type: block_float.cu, block_double.cu.
#pragma once

#include <cstdint>

#include "task_program/op_arguments.h"

namespace fastmeta {

// Bytes of workspace; -1 if a task does not fit.
template <typename value_t>
int64_t block_workspace(const OpArguments& args);

template <typename value_t>
int launch_blocks(const OpArguments& args, void* workspace, void* stream);

}  // namespace fastmeta
