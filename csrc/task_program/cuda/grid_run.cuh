// A call as one launch for each step: its memory, and the copies of the tasks' numbers in and out.
#pragma once

#include <cmath>

#include "common/cuda/workspace.h"
#include "task_program/cuda/grid_executor.cuh"
#include "task_program/cuda/host_passes.cuh"
#include "task_program/cuda/sum_over_tasks.h"

#ifndef FASTMETA_TASK_BYTES
#define FASTMETA_TASK_BYTES (int64_t(4) << 30)  // of all tasks that run at a time
#endif

namespace fastmeta {

// Converts labels to numbers, and computes norm = scale/labels that count (mean), or scale; NaN for
// an absent example that the program cannot leave out. A warp owns a task.
template <typename value_t>
struct LoadLabels {
  const int64_t* labels;
  int64_t task_stride, count, ignored;
  bool mean, takes_absent;
  double scale;
  Array<value_t> targets, norm;

  __device__ void operator()(const GlobalThreadGroup<value_t>& group, int64_t) const {
    const int64_t* label = labels + group.task * task_stride;
    value_t counted = 0, absent = 0;
    for (int64_t i = group.lane; i < count; i += group.size) {
      const int64_t own = label[i] == ignored ? kIgnoredLabel : label[i];
      counted += own < 0 ? 0 : 1;
      absent += own == kAbsent ? 1 : 0;
      group.store(targets, i, static_cast<value_t>(own));
    }
    counted = group.sum(counted);
    absent = group.sum(absent);
    const bool is_right = takes_absent || absent == 0;
    const double factor = norm_of_labels(scale, mean, counted, absent == count);
    if (group.lane == 0) group.store(norm, 0, static_cast<value_t>(is_right ? factor : NAN));
  }
};

template <typename value_t>
class GridRun {
 public:
  // Constructor; without a workspace it can only tell the workspace's size.
  GridRun(const OpArguments& args, void* workspace, cudaStream_t stream)
      : args_(args), stream_(stream) {
    BumpAllocator<value_t> counter(nullptr, 0);
    // Two passes: the first counts a task's numbers, the second hands out memory.
    allocate(counter);
    stride_ = counter.used();
    const int64_t task_bytes = stride_ * static_cast<int64_t>(sizeof(value_t));
    // As many tasks at a time as fit the memory bound, at least one.
    chunk_ = std::clamp<int64_t>(FASTMETA_TASK_BYTES / task_bytes, 1, args.tasks);
    Workspace space(workspace);
    parts_ = space.take<value_t>(GridExecutor<value_t>::part_numbers());
    auto* tasks = space.take<value_t>(stride_ * chunk_);
    bytes_ = space.bytes();
    BumpAllocator<value_t> allocator(tasks, stride_);
    if (workspace != nullptr) allocate(allocator);
  }

  int64_t bytes() const { return bytes_; }

  cudaError_t run() {
    for (int64_t first = 0; first < args_.tasks; first += chunk_) {
      const cudaError_t error = run_tasks(first, std::min(chunk_, args_.tasks - first));
      if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
  }

 private:
  using Executor = GridExecutor<value_t>;
  using Numbers = Array<value_t>;

  void allocate(BumpAllocator<value_t>& allocator) {
    auto needs = args_.needs();
    if (args_.kind == OpKind::kHvp) needs.vectors = 0;
    task_ = take_task_arrays(allocator, args_.program, needs);
    allocate_examples(allocator, args_.support, task_.support);
    allocate_examples(allocator, args_.query, task_.query);
  }

  void allocate_examples(BumpAllocator<value_t>& allocator, const ExampleSet& set,
                         Examples<value_t>& examples) {
    examples.count = set.count;
    examples.norm = allocator.take(1);
    if (args_.has_labels()) examples.targets = allocator.take(set.count);
  }

  // View of row `first` and the following rows of an input or result.
  static Numbers rows_of(const void* data, int64_t first, int64_t stride) {
    if (data == nullptr) return {};
    return {const_cast<value_t*>(static_cast<const value_t*>(data)) + first * stride, stride};
  }

  cudaError_t run_tasks(int64_t first, int64_t tasks) {
    Executor executor(tasks, parts_, stream_, args_.tf32);
    const Program& program = args_.program;
    // A copy: each chunk points it at other rows.
    auto task = task_;
    task.start = rows_of(args_.theta, first, args_.theta_stride);
    task.frozen = rows_of(args_.frozen, 0, 0);
    task.step_sizes = {rows_of(args_.lr, first, args_.lr_task_stride), args_.lr_step_stride,
                       args_.lr_per_parameter};
    load_examples(executor, args_.support, first, task.support);
    load_examples(executor, args_.query, first, task.query);
    make_in_place(first, task);
    const auto given = rows_of(args_.given, first, args_.given_elements());
    if (args_.kind == OpKind::kHvp) {
      task.direction = given;
    } else if (given) {
      // v is overwritten step by step; the caller's gradient must not be.
      executor.map(program.adapted, Copy<value_t>{given, task.v});
    }
    run_op(executor, args_, task);
    store_results(executor, first, task);
    return executor.error() != cudaSuccess ? executor.error() : add_up(tasks, task);
  }

  void load_examples(Executor& executor, const ExampleSet& set, int64_t first,
                     Examples<value_t>& examples) const {
    if (set.count == 0) return;
    examples.x = rows_of(set.x, first, set.x_stride);
    if (args_.kind == OpKind::kForward) return;
    examples.weight = rows_of(set.weight, first, set.weight_stride);
    const auto& loss = args_.program.loss;
    if (args_.has_labels()) {
      const auto* labels = static_cast<const int64_t*>(set.targets) + first * set.targets_stride;
      executor.rows(1, LoadLabels<value_t>{
                           labels, set.targets_stride, set.count, static_cast<int64_t>(loss.b),
                           args_.divides_by_examples(set), !args_.program.has_batch_norm,
                           loss.scale, examples.targets, examples.norm});
      return;
    }
    examples.targets = rows_of(set.targets, first, set.targets_stride);
    executor.map(1, Fill<value_t>{args_.norm_of_targets(set), examples.norm});
  }

  // Points arrays that a task computes in one go straight at the results.
  void make_in_place(int64_t first, TaskArrays<value_t>& task) const {
    const int64_t input = args_.program.values[0].elements;
    const auto place = [&](void* result, int64_t count, Numbers& array) {
      if (result != nullptr) array = rows_of(result, first, count);
    };
    place(args_.loss, 1, task.loss);
    place(args_.grad_support, args_.support.count * input, task.grad_support);
    place(args_.grad_query, args_.query.count * input, task.grad_query);
    if (!args_.grad_theta_shared) place(args_.grad_theta, args_.gradient_elements(), task.v);
  }

  void store_results(Executor& executor, int64_t first, const TaskArrays<value_t>& task) const {
    const Program& program = args_.program;
    if (args_.outputs != nullptr) {
      const int64_t count = args_.query.count * program.output_elements();
      const Network<value_t> net{program, {}, {}, task.query, task.query_arrays};
      executor.map(count, Copy<value_t>{task.outputs ? task.outputs : net.value(program.output),
                                        rows_of(args_.outputs, first, count)});
    }
    const int last = args_.options.steps - 1;
    if (args_.adapted != nullptr) {
      executor.map(program.adapted,
                   Copy<value_t>{last < 0 ? task.start : task.states.from(last * task.state_stride),
                                 rows_of(args_.adapted, first, program.adapted)});
    }
    if (args_.grad_lr == nullptr || shares_lr()) return;
    const int64_t row = args_.lr_row();
    for (int64_t k = 0; k < args_.lr_elements() / row; ++k) {
      executor.map(
          row, Copy<value_t>{task.grad_lr.from(k * row),
                             rows_of(args_.grad_lr, first, row).from(k * args_.lr_step_stride)});
    }
  }

  bool shares_lr() const { return args_.lr_task_stride == 0; }

  // Adds up, over tasks, the gradients that tasks share.
  cudaError_t add_up(int64_t tasks, const TaskArrays<value_t>& task) const {
    int error = cudaSuccess;
    const auto add = [&](const Numbers& rows, int64_t count, void* target) {
      if (error != cudaSuccess) return;
      error = launch_sum_over_tasks<value_t>(tasks, count, rows.data, rows.task_stride,
                                             static_cast<value_t*>(target), stream_);
    };
    if (args_.grad_theta != nullptr && args_.grad_theta_shared) {
      add(task.v, args_.program.parameters, args_.grad_theta);
    }
    if (args_.grad_lr != nullptr && shares_lr()) {
      add(task.grad_lr, args_.lr_elements(), args_.grad_lr);
    }
    return static_cast<cudaError_t>(error);
  }

  const OpArguments& args_;
  cudaStream_t stream_;
  TaskArrays<value_t> task_;
  value_t* parts_;
  int64_t stride_ = 0, chunk_ = 1, bytes_ = 0;
};

}  // namespace fastmeta
