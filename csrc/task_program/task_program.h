// The task program on a GPU: what runs a job whose pointers are on the current device.
#pragma once

#include <cstdint>

#include "task_program/job.h"

namespace fastmeta {

// Bytes, on the device, that launch_task_program needs.
int64_t task_program_workspace(const Job& job);

// Returns a cudaError_t. A label without a class is that of no output; it changes no other task.
int launch_task_program(const Job& job, void* workspace, void* stream);

}  // namespace fastmeta
