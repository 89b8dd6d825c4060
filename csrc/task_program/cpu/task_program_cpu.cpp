// CPU implementation of the task program.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "task_program/cpu/run.h"
#include "task_program/labels.h"
#include "task_program/ops.h"

namespace fastmeta {
namespace {

struct OnCpu {
  static void check_labels(const at::Tensor& labels, int64_t classes, int64_t ignored,
                           const char* name) {
    check_class_labels(labels, classes, ignored, name);
  }

  // On one thread a task.
  static bool has_thin_blocks(const Job& job) { return job.tasks >= at::get_num_threads(); }

  static void run(const Job& job, const at::Tensor&) {
    if (job.dtype == Dtype::kFloat) {
      run_on_cpu<float>(job);
    } else {
      run_on_cpu<double>(job);
    }
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(fastmeta, CPU, m) { register_task_program<OnCpu>(m); }

}  // namespace fastmeta
