// A job on the CPU. Files of each number type: run_float.cpp, run_double.cpp.
#pragma once

#include "task_program/job.h"

namespace fastmeta {

template <typename value_t>
void run_on_cpu(const Job& job);

}  // namespace fastmeta
