#include "task_program/cuda/block_run.cuh"
#include "task_program/cuda/block_run.h"

namespace fastmeta {

template <>
int64_t block_workspace<double>(const OpArguments& args) {
  int64_t bytes = -1;
  with_block_run<double>(args, nullptr, [&](auto& run) { bytes = run.workspace_bytes(); });
  return bytes;
}

template <>
int launch_blocks<double>(const OpArguments& args, void* workspace, void* stream) {
  int error = cudaErrorInvalidValue;
  with_block_run<double>(args, workspace, [&](auto& run) { error = run.run(stream); });
  return error;
}

}  // namespace fastmeta
