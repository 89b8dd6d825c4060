#include "task_program/cuda/block_run.cuh"
#include "task_program/cuda/block_run.h"

namespace fastmeta {

template <>
int64_t block_workspace<float>(const OpArguments& args) {
  int64_t bytes = -1;
  with_block_run<float>(args, nullptr, [&](auto& run) { bytes = run.workspace_bytes(); });
  return bytes;
}

template <>
int launch_blocks<float>(const OpArguments& args, void* workspace, void* stream) {
  int error = cudaErrorInvalidValue;
  with_block_run<float>(args, workspace, [&](auto& run) { error = run.run(stream); });
  return error;
}

}  // namespace fastmeta
