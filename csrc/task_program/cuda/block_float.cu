#include "task_program/cuda/block_run.cuh"
#include "task_program/cuda/block_run.h"

namespace fastmeta {

template <>
int64_t block_workspace<float>(const Job& job) {
  int64_t bytes = -1;
  with_block_run<float>(job, nullptr, [&](auto& run) { bytes = run.workspace_bytes(); });
  return bytes;
}

template <>
int launch_blocks<float>(const Job& job, void* workspace, void* stream) {
  int error = cudaErrorInvalidValue;
  with_block_run<float>(job, workspace, [&](auto& run) { error = run.run(stream); });
  return error;
}

}  // namespace fastmeta
