#include "task_program/cuda/grid_run.cuh"
#include "task_program/cuda/grid_run.h"

namespace fastmeta {

template <>
int64_t grid_workspace<double>(const OpArguments& args) {
  return GridRun<double>(args, nullptr, nullptr).bytes();
}

template <>
int launch_grid<double>(const OpArguments& args, void* workspace, void* stream) {
  return GridRun<double>(args, workspace, static_cast<cudaStream_t>(stream)).run();
}

}  // namespace fastmeta
