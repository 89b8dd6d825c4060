// CUDA implementation of the task program: tensors to the launcher.
#include <ATen/ops/eq.h>
#include <ATen/ops/masked_fill.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "common/cuda_check.h"
#include "task_program/labels.h"
#include "task_program/ops.h"
#include "task_program/task_program.h"

namespace fastmeta {
namespace {

struct OnCuda {
  static void check_labels(const at::Tensor& labels, int64_t classes, int64_t ignored,
                           const char* name) {
    const c10::cuda::CUDAGuard guard(labels.device());
    const auto counted = labels.masked_fill(labels.eq(ignored), 0).contiguous();
    if (has_cuda_label_out_of_range(counted, classes, name)) {
      check_class_labels(labels.cpu(), classes, ignored, name);
    }
  }

  static void run(const Job& job, const at::Tensor& theta) {
    const c10::cuda::CUDAGuard guard(theta.device());
    const auto workspace = scratch(task_program_workspace(job), theta);
    check_launch(launch_task_program(job, workspace.mutable_data_ptr(), current_stream()),
                 "task_program");
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(fastmeta, CUDA, m) { register_task_program<OnCuda>(m); }

}  // namespace fastmeta
