// CUDA implementation of the task program: a block owns a task if it fits into shared memory, else
// every step is a launch for all tasks. Labels are not checked while a graph is captured: a label
// without a class then matches no output, and changes no other task; an absent example, which a
// program with a batch norm refuses, makes the loss of its task NaN. If every step is a launch,
// float32 is TF32 as PyTorch's settings allow it: torch.backends.cudnn.allow_tf32 for convolutions,
// torch.backends.cuda.matmul.allow_tf32 for linear layers.
#include <ATen/Context.h>
#include <ATen/ops/eq.h>
#include <ATen/ops/masked_fill.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "common/cuda/cuda_check.h"
#include "convolution/cuda/int_sizes.h"
#include "task_program/cuda/block_run.h"
#include "task_program/cuda/grid_run.h"
#include "task_program/labels.h"
#include "task_program/ops.h"

namespace fastmeta {
namespace {

template <typename value_t>
void run_as(const OpArguments& args, const at::Tensor& theta) {
  const int64_t block_bytes = block_workspace<value_t>(args);
  const bool in_blocks = block_bytes >= 0;
  const auto workspace = scratch(in_blocks ? block_bytes : grid_workspace<value_t>(args), theta);
  const auto launch = in_blocks ? launch_blocks<value_t> : launch_grid<value_t>;
  check_launch(launch(args, workspace.mutable_data_ptr(), current_stream()), "task_program");
}

// Raises for images that the kernels cannot count.
void check_sizes(const OpArguments& args) {
  constexpr int64_t kMost = kMostInInt - 256;  // as in ImageGrid::has()
  const Program& program = args.program;
  const int64_t examples = std::max(args.support.count, args.query.count);
  for (int n = 0; n < program.instruction_count; ++n) {
    const Instruction& i = program.instructions[n];
    if (i.op == Opcode::kConvolution) check_counts_in_int(i.conv, "task_program");
    if (i.op != Opcode::kNorm && i.op != Opcode::kPool) continue;
    const int64_t channels = i.op == Opcode::kNorm ? i.inputs : i.pool.channels;
    const int64_t elements = std::max(program.values[i.x].elements, program.values[i.y].elements);
    const int64_t positions = examples * (elements / channels);
    TORCH_CHECK(positions <= kMost, "task_program: the positions of a task's images (examples x ",
                "height x width): expected at most ", kMost, " on CUDA, got ", positions);
  }
}

// Whether linear layers may use TF32. allowTF32CuBLAS() raises if the setting was made by its newer
// name, fp32_precision.
bool allows_tf32_products() {
  const auto precision =
      at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL);
  return precision == at::Float32Precision::TF32;
}

struct OnCuda {
  static void check_labels(const at::Tensor& labels, int64_t lowest, int64_t classes,
                           int64_t ignored, const char* name) {
    const c10::cuda::CUDAGuard guard(labels.device());
    // No part of the check joins a graph that is being captured.
    check_cuda_labels_once(labels, {classes, ignored, lowest}, [&] {
      const auto counted = labels.masked_fill(labels.eq(ignored), 0).contiguous();
      if (has_cuda_label_out_of_range(counted, classes, name, lowest)) {
        check_class_labels(labels.cpu(), lowest, classes, ignored, name);
      }
    });
  }

  static bool has_fused_bands(const OpArguments&) { return false; }

  static void run(OpArguments& args, const at::Tensor& theta) {
    const c10::cuda::CUDAGuard guard(theta.device());
    check_sizes(args);
    args.tf32 = {at::globalContext().allowTF32CuDNN(at::Float32Op::CONV), allows_tf32_products()};
    if (args.dtype == Dtype::kFloat) {
      run_as<float>(args, theta);
    } else {
      run_as<double>(args, theta);
    }
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(fastmeta, CUDA, m) { register_task_program<OnCuda>(m); }

}  // namespace fastmeta
