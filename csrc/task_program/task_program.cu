#include "task_program/block_run.h"
#include "task_program/grid_run.h"
#include "task_program/task_program.h"

namespace fastmeta {
namespace {

template <typename value_t>
int64_t workspace_of(const Job& job) {
  const int64_t bytes = block_workspace<value_t>(job);
  return bytes >= 0 ? bytes : grid_workspace<value_t>(job);
}

template <typename value_t>
int launch_as(const Job& job, void* workspace, void* stream) {
  return block_workspace<value_t>(job) >= 0 ? launch_blocks<value_t>(job, workspace, stream)
                                            : launch_grid<value_t>(job, workspace, stream);
}

}  // namespace

int64_t task_program_workspace(const Job& job) {
  return job.dtype == Dtype::kFloat ? workspace_of<float>(job) : workspace_of<double>(job);
}

int launch_task_program(const Job& job, void* workspace, void* stream) {
  return job.dtype == Dtype::kFloat ? launch_as<float>(job, workspace, stream)
                                    : launch_as<double>(job, workspace, stream);
}

}  // namespace fastmeta
