#include "task_program/cuda/grid_run.cuh"
#include "task_program/cuda/grid_run.h"

namespace fastmeta {

template <>
int64_t grid_workspace<double>(const Job& job) {
  return GridRun<double>(job, nullptr, nullptr).bytes();
}

template <>
int launch_grid<double>(const Job& job, void* workspace, void* stream) {
  return GridRun<double>(job, workspace, static_cast<cudaStream_t>(stream)).run();
}

}  // namespace fastmeta
