#include "task_program/cuda/grid_run.cuh"
#include "task_program/cuda/grid_run.h"

namespace fastmeta {

template <>
int64_t grid_workspace<float>(const OpArguments& args) {
  return GridRun<float>(args, nullptr, nullptr).bytes();
}

template <>
int launch_grid<float>(const OpArguments& args, void* workspace, void* stream) {
  return GridRun<float>(args, workspace, static_cast<cudaStream_t>(stream)).run();
}

}  // namespace fastmeta
