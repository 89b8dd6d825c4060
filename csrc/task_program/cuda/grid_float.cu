#include "task_program/cuda/grid_run.cuh"
#include "task_program/cuda/grid_run.h"

namespace fastmeta {

template <>
int64_t grid_workspace<float>(const Job& job) {
  return GridRun<float>(job, nullptr, nullptr).bytes();
}

template <>
int launch_grid<float>(const Job& job, void* workspace, void* stream) {
  return GridRun<float>(job, workspace, static_cast<cudaStream_t>(stream)).run();
}

}  // namespace fastmeta
