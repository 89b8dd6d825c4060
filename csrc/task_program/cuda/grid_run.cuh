// A job as one launch for each step: its memory, and the way of the tasks' numbers in and out.
#pragma once

#include "common/cuda/workspace.h"
#include "task_program/cuda/grid_executor.cuh"
#include "task_program/cuda/host_passes.cuh"
#include "task_program/cuda/sum_over_tasks.h"

#ifndef FASTMETA_TASK_BYTES
#define FASTMETA_TASK_BYTES (int64_t(4) << 30)  // of all tasks that are done at a time
#endif

namespace fastmeta {

// Labels as numbers, -1 for those to ignore, and norm = scale/labels that count (mean), or scale.
// A warp takes a task.
template <typename value_t>
struct LoadLabels {
  const int64_t* labels;
  int64_t task_stride, count, ignored;
  bool mean;
  double scale;
  Array<value_t> targets, norm;

  __device__ void operator()(const GlobalTeam<value_t>& team, int64_t) const {
    const int64_t* label = labels + team.task * task_stride;
    value_t valid = 0;
    for (int64_t i = team.lane; i < count; i += team.size) {
      const bool is_ignored = label[i] == ignored;
      valid += is_ignored ? 0 : 1;
      team.store(targets, i, is_ignored ? value_t(-1) : static_cast<value_t>(label[i]));
    }
    valid = team.sum(valid);
    if (team.lane == 0) team.store(norm, 0, static_cast<value_t>(mean ? scale / valid : scale));
  }
};

template <typename value_t>
class GridRun {
 public:
  // Without a workspace it can only say how large that must be.
  GridRun(const Job& job, void* workspace, cudaStream_t stream) : job_(job), stream_(stream) {
    Carver<value_t> counter(nullptr, 0);
    carve(counter);
    stride_ = counter.used();
    const int64_t task_bytes = stride_ * static_cast<int64_t>(sizeof(value_t));
    chunk_ = std::clamp<int64_t>(FASTMETA_TASK_BYTES / task_bytes, 1, job.tasks);
    Workspace space(workspace);
    parts_ = space.take<value_t>(GridExecutor<value_t>::part_numbers());
    auto* tasks = space.take<value_t>(stride_ * chunk_);
    bytes_ = space.bytes();
    Carver<value_t> carver(tasks, stride_);
    if (workspace != nullptr) carve(carver);
  }

  int64_t bytes() const { return bytes_; }

  cudaError_t run() {
    for (int64_t first = 0; first < job_.tasks; first += chunk_) {
      const cudaError_t error = run_tasks(first, std::min(chunk_, job_.tasks - first));
      if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
  }

 private:
  using Executor = GridExecutor<value_t>;
  using Numbers = Array<value_t>;

  void carve(Carver<value_t>& carver) {
    task_ = take_task_arrays(carver, job_.program, job_.needs());
    carve_examples(carver, job_.support, task_.support);
    carve_examples(carver, job_.query, task_.query);
  }

  void carve_examples(Carver<value_t>& carver, const ExampleSet& set, Examples<value_t>& examples) {
    examples.count = set.count;
    examples.norm = carver.take(1);
    if (has_labels()) examples.targets = carver.take(set.count);
  }

  bool has_labels() const { return job_.program.loss.kind == LossKind::kCrossEntropy; }

  // Row `first` and those after it of an input, or of a result, where it is.
  static Numbers rows_of(const void* data, int64_t first, int64_t stride) {
    if (data == nullptr) return {};
    return {const_cast<value_t*>(static_cast<const value_t*>(data)) + first * stride, stride};
  }

  cudaError_t run_tasks(int64_t first, int64_t tasks) {
    Executor executor(tasks, parts_, stream_, job_.tf32);
    const Program& program = job_.program;
    auto task = task_;
    task.start = rows_of(job_.theta, first, job_.theta_stride);
    task.frozen = rows_of(job_.frozen, 0, 0);
    task.step_sizes = {rows_of(job_.lr, first, job_.lr_task_stride), job_.lr_step_stride,
                       job_.lr_per_parameter};
    load_examples(executor, job_.support, first, task.support);
    load_examples(executor, job_.query, first, task.query);
    make_in_place(first, task);
    const auto given = rows_of(job_.given, first, program.parameters);
    if (job_.kind == JobKind::kHvp) {
      task.direction = given;
    } else if (given) {
      executor.map(program.parameters, Copy<value_t>{given, task.v});
    }
    run_job(executor, job_, task);
    store_results(executor, first, task);
    return executor.error() != cudaSuccess ? executor.error() : add_up(tasks, task);
  }

  void load_examples(Executor& executor, const ExampleSet& set, int64_t first,
                     Examples<value_t>& examples) const {
    if (set.count == 0) return;
    examples.x = rows_of(set.x, first, set.x_stride);
    if (job_.kind == JobKind::kForward) return;
    const auto& loss = job_.program.loss;
    if (has_labels()) {
      const auto* labels = static_cast<const int64_t*>(set.targets) + first * set.targets_stride;
      executor.rows(1, LoadLabels<value_t>{labels, set.targets_stride, set.count,
                                           static_cast<int64_t>(loss.b), loss.mean, loss.scale,
                                           examples.targets, examples.norm});
      return;
    }
    examples.targets = rows_of(set.targets, first, set.targets_stride);
    const auto elements = static_cast<double>(set.count * job_.program.output_elements());
    executor.map(1, Fill<value_t>{loss.mean ? loss.scale / elements : loss.scale, examples.norm});
  }

  // What a task makes in one go is made where the result is to be.
  void make_in_place(int64_t first, TaskArrays<value_t>& task) const {
    const int64_t parameters = job_.program.parameters, input = job_.program.values[0].elements;
    const auto place = [&](void* result, int64_t count, Numbers& array) {
      if (result != nullptr) array = rows_of(result, first, count);
    };
    place(job_.loss, 1, task.loss);
    place(job_.grad_support, job_.support.count * input, task.grad_support);
    place(job_.grad_query, job_.query.count * input, task.grad_query);
    if (!job_.grad_theta_shared) place(job_.grad_theta, parameters, task.v);
  }

  void store_results(Executor& executor, int64_t first, const TaskArrays<value_t>& task) const {
    const Program& program = job_.program;
    if (job_.outputs != nullptr) {
      const int64_t count = job_.query.count * program.output_elements();
      const Network<value_t> net{program, {}, {}, task.query, task.query_arrays};
      executor.map(count, Copy<value_t>{task.outputs ? task.outputs : net.value(program.output),
                                        rows_of(job_.outputs, first, count)});
    }
    const int last = job_.options.steps - 1;
    if (job_.adapted != nullptr) {
      executor.map(program.parameters,
                   Copy<value_t>{last < 0 ? task.start : task.states.from(last * task.state_stride),
                                 rows_of(job_.adapted, first, program.parameters)});
    }
    if (job_.grad_lr == nullptr || shares_lr()) return;
    const int64_t row = job_.lr_row();
    for (int64_t k = 0; k < job_.lr_elements() / row; ++k) {
      executor.map(row,
                   Copy<value_t>{task.grad_lr.from(k * row),
                                 rows_of(job_.grad_lr, first, row).from(k * job_.lr_step_stride)});
    }
  }

  bool shares_lr() const { return job_.lr_task_stride == 0; }

  // To the sums over tasks, of what they share.
  cudaError_t add_up(int64_t tasks, const TaskArrays<value_t>& task) const {
    int error = cudaSuccess;
    const auto add = [&](const Numbers& rows, int64_t count, void* target) {
      if (error != cudaSuccess) return;
      error = launch_sum_over_tasks<value_t>(tasks, count, rows.data, rows.task_stride,
                                             static_cast<value_t*>(target), stream_);
    };
    if (job_.grad_theta != nullptr && job_.grad_theta_shared) {
      add(task.v, job_.program.parameters, job_.grad_theta);
    }
    if (job_.grad_lr != nullptr && shares_lr()) {
      add(task.grad_lr, job_.lr_elements(), job_.grad_lr);
    }
    return static_cast<cudaError_t>(error);
  }

  const Job& job_;
  cudaStream_t stream_;
  TaskArrays<value_t> task_;
  value_t* parts_;
  int64_t stride_ = 0, chunk_ = 1, bytes_ = 0;
};

}  // namespace fastmeta
