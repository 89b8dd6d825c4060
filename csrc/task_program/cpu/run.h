// Entry points of the task program on the CPU, one file a number type: run_float.cpp,
// run_double.cpp.
#pragma once

#include "task_program/op_arguments.h"

namespace fastmeta {

template <typename value_t>
void run_on_cpu(const OpArguments& args);

}  // namespace fastmeta
