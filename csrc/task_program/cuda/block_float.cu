#include "task_program/cuda/block_run.cuh"
#include "task_program/cuda/block_run.h"

namespace fastmeta {

template <>
int64_t block_workspace<float>(const OpArguments& args) {
  return workspace_of_blocks<float>(args);
}

template <>
int launch_blocks<float>(const OpArguments& args, void* workspace, void* stream) {
  return run_blocks<float>(args, workspace, stream);
}

}  // namespace fastmeta
