// CPU implementation of the task program.
#include <torch/library.h>

#include "common/cpu/parallel.h"
#include "task_program/cpu/run.h"
#include "task_program/labels.h"
#include "task_program/ops.h"

namespace fastmeta {
namespace {

struct OnCpu {
  static void check_labels(const at::Tensor& labels, int64_t lowest, int64_t classes,
                           int64_t ignored, const char* name) {
    check_class_labels(labels, lowest, classes, ignored, name);
  }

  // Whether each task has one thread.
  static bool has_fused_bands(const OpArguments& args) { return args.tasks >= thread_count(); }

  static void run(const OpArguments& args, const at::Tensor&) {
    if (args.dtype == Dtype::kFloat) {
      run_on_cpu<float>(args);
    } else {
      run_on_cpu<double>(args);
    }
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(fastmeta, CPU, m) { register_task_program<OnCpu>(m); }

}  // namespace fastmeta
