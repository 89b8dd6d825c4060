// A call as one launch for each step, of all tasks or of chunks of them. Files of each number type:
// grid_float.cu, grid_double.cu.
#pragma once

#include <cstdint>

#include "task_program/op_arguments.h"

namespace fastmeta {

template <typename value_t>
int64_t grid_workspace(const OpArguments& args);

template <typename value_t>
int launch_grid(const OpArguments& args, void* workspace, void* stream);

}  // namespace fastmeta
