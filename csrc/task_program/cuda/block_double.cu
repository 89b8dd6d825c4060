#include "task_program/cuda/block_run.cuh"
#include "task_program/cuda/block_run.h"

namespace fastmeta {

template <>
int64_t block_workspace<double>(const OpArguments& args) {
  return workspace_of_blocks<double>(args);
}

template <>
int launch_blocks<double>(const OpArguments& args, void* workspace, void* stream) {
  return run_blocks<double>(args, workspace, stream);
}

}  // namespace fastmeta
