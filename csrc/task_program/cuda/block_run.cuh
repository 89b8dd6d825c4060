// A whole job in one kernel: what it has in shared memory, and the list of its steps.
//
// A meta-step of a 1-40-40-1 MLP on 10 + 10 examples is 54 steps with 24 waits in 68 KB of shared
// memory for one inner step, 198 with 84 in 148 KB for five; it takes 0.2 and 0.8 million
// multiplications a task, 7 KB in and out, one launch, and one for the sum over tasks.
#pragma once

#include <algorithm>
#include <utility>

#include "common/ceil_div.h"
#include "common/cuda/multiprocessors.cuh"
#include "common/cuda/workspace.h"
#include "task_program/cuda/block_kernel.cuh"
#include "task_program/cuda/sum_over_tasks.h"

namespace fastmeta {

template <typename value_t, int bytes>
class BlockRun {
 public:
  // Without a workspace it can only say whether it fits, and how large that must be.
  BlockRun(const Job& job, void* workspace) : job_(job) {
    fits_ = !job.program.has_images &&
            (plan(job) || (job.options.keeps_steps && plan(made_again(job))));
    Workspace space(workspace);
    if (sums_theta()) v_ = space.take<value_t>(job.tasks * job.program.parameters);
    if (sums_lr()) grad_lr_ = space.take<value_t>(job.tasks * job.lr_elements());
    workspace_bytes_ = space.bytes();
  }

  bool fits() const { return fits_; }
  int64_t workspace_bytes() const { return workspace_bytes_; }

  int run(void* stream) {
    transfer_in();
    transfer_out();
    int error = launch(block_kernel<value_t, bytes>, job_.tasks, threads(), shared_bytes_,
                       static_cast<cudaStream_t>(stream), j_);
    const auto add_up = [&](const value_t* rows, int64_t count, void* target) {
      if (error != cudaSuccess || rows == nullptr) return;
      error = launch_sum_over_tasks(job_.tasks, count, rows, count, static_cast<value_t*>(target),
                                    stream);
    };
    add_up(v_, job_.program.parameters, job_.grad_theta);
    add_up(grad_lr_, job_.lr_elements(), job_.grad_lr);
    return error;
  }

 private:
  using Storage = InShared<value_t>;
  using Numbers = Array<Storage>;
  using Recorder = BlockRecorder<value_t, bytes>;

  bool sums_theta() const { return job_.grad_theta != nullptr && job_.grad_theta_shared; }
  bool sums_lr() const { return job_.grad_lr != nullptr && job_.lr_task_stride == 0; }
  bool has_labels() const { return job_.program.loss.kind == LossKind::kCrossEntropy; }
  bool has_loss() const { return job_.kind != JobKind::kForward; }

  static Job made_again(Job job) {
    job.options.keeps_steps = false;
    return job;
  }

  // Gives every array its place and records the steps; whether both fit.
  bool plan(const Job& job) {
    const Program& program = job.program;
    Carver<Storage> carver;
    task_ = take_task_arrays(carver, program, job.needs());
    task_.start = carver.take(program.parameters);
    task_.frozen = carver.take(program.frozen);
    const int64_t lr = job.lr == nullptr ? 0 : job.lr_elements();
    task_.step_sizes = {carver.take(lr), job.lr_dense_stride(), job.lr_per_parameter};
    for (auto [set, examples] :
         {std::pair(&job.support, &task_.support), std::pair(&job.query, &task_.query)}) {
      examples->count = set->count;
      examples->norm = carver.take(1);
      examples->x = carver.take(set->count * program.values[0].elements);
      examples->targets = carver.take(set->count * target_elements());
    }
    shared_bytes_ = carver.used() * static_cast<int64_t>(sizeof(value_t));
    if (shared_bytes_ > largest_shared_memory()) return false;
    j_.steps.used = 0;
    Recorder recorder(j_.steps);
    record_norm(recorder, job.support, task_.support);
    record_norm(recorder, job.query, task_.query);
    run_job(recorder, job, task_);
    return recorder.fits();
  }

  int64_t target_elements() const { return has_labels() ? 1 : job_.program.output_elements(); }

  void record_norm(Recorder& recorder, const ExampleSet& set, const Examples<Storage>& examples) {
    if (set.count == 0 || !has_loss()) return;
    const auto& loss = job_.program.loss;
    if (has_labels()) {
      recorder.rows(1, NormOfLabels<Storage>{set.count, loss.mean, loss.scale, examples.targets,
                                             examples.norm});
    } else {
      const auto elements = static_cast<double>(set.count * target_elements());
      recorder.map(1, Fill<Storage>{loss.mean ? loss.scale / elements : loss.scale, examples.norm});
    }
  }

  void add_in(const void* source, int64_t task_stride, int64_t count, const Numbers& target) {
    if (source == nullptr || count == 0) return;
    j_.in[j_.ins++] = {const_cast<void*>(source), task_stride,  count, 0,
                       static_cast<int>(count),   target.offset};
  }

  void transfer_in() {
    const Program& program = job_.program;
    j_.ins = 0;
    add_in(job_.theta, job_.theta_stride, program.parameters, task_.start);
    add_in(job_.frozen, 0, program.frozen, task_.frozen);
    if (job_.lr != nullptr) {
      j_.in[j_.ins++] = {const_cast<void*>(job_.lr),
                         job_.lr_task_stride,
                         job_.lr_row(),
                         job_.lr_step_stride,
                         static_cast<int>(job_.lr_elements()),
                         task_.step_sizes.lr.offset};
    }
    add_in(job_.given, program.parameters, program.parameters,
           job_.kind == JobKind::kHvp ? task_.direction : task_.v);
    const int64_t input = program.values[0].elements;
    add_in(job_.support.x, job_.support.x_stride, job_.support.count * input, task_.support.x);
    add_in(job_.query.x, job_.query.x_stride, job_.query.count * input, task_.query.x);
    j_.first_labels = has_labels() ? j_.ins : kMostTransfers;
    j_.ignored = static_cast<int64_t>(program.loss.b);
    for (auto [set, examples] :
         {std::pair(&job_.support, &task_.support), std::pair(&job_.query, &task_.query)}) {
      if (has_loss()) {
        add_in(set->targets, set->targets_stride, set->count * target_elements(),
               examples->targets);
      }
    }
  }

  // To rows of `count` numbers, where they are wanted.
  void add_out(const Numbers& source, int64_t count, void* target) {
    if (target == nullptr || count == 0) return;
    j_.out[j_.outs++] = {target, count, count, 0, static_cast<int>(count), source.offset};
  }

  void transfer_out() {
    const Program& program = job_.program;
    const int64_t parameters = program.parameters, input = program.values[0].elements;
    const Network<Storage> net{program, {}, {}, task_.query, task_.query_arrays};
    const int last = job_.options.steps - 1;
    j_.outs = 0;
    add_out(task_.outputs ? task_.outputs : net.value(program.output),
            job_.query.count * program.output_elements(), job_.outputs);
    add_out(task_.loss, 1, job_.loss);
    add_out(last < 0 ? task_.start : task_.states.from(last * task_.state_stride), parameters,
            job_.adapted);
    add_out(task_.grad_support, job_.support.count * input, job_.grad_support);
    add_out(task_.grad_query, job_.query.count * input, job_.grad_query);
    add_out(task_.v, parameters, sums_theta() ? v_ : job_.grad_theta);
    if (sums_lr()) {
      add_out(task_.grad_lr, job_.lr_elements(), grad_lr_);
    } else if (job_.grad_lr != nullptr) {
      const int64_t row = job_.lr_row();
      j_.out[j_.outs++] = {
          job_.grad_lr,        row, row, job_.lr_step_stride, static_cast<int>(job_.lr_elements()),
          task_.grad_lr.offset};
    }
  }

  // A thread for every 4 parameters.
  int threads() const {
    const int64_t warps = ceil_div(job_.program.parameters, 4 * kWarp);
    return static_cast<int>(std::clamp<int64_t>(warps * kWarp, 64, kMostBlockThreads));
  }

  const Job& job_;
  TaskArrays<Storage> task_;
  BlockJob<value_t, bytes> j_{};
  value_t *v_ = nullptr, *grad_lr_ = nullptr;
  bool fits_;
  int64_t shared_bytes_ = 0, workspace_bytes_ = 0;
};

// Lengths of lists of steps: what fits into the 4 KiB of arguments that all drivers take, and into
// the 32764 bytes since CUDA 12.1.
inline constexpr int kShortList = 3400, kLongList = 20000;

// body(run) with a run that fits, if there is one; whether there is.
template <typename value_t, typename Body>
bool with_block_run(const Job& job, void* workspace, const Body& body) {
  static_assert(sizeof(BlockJob<value_t, kShortList>) <= 4096 &&
                sizeof(BlockJob<value_t, kLongList>) <= 32764);
  BlockRun<value_t, kShortList> short_run(job, workspace);
  if (short_run.fits()) {
    body(short_run);
    return true;
  }
  BlockRun<value_t, kLongList> long_run(job, workspace);
  if (long_run.fits()) body(long_run);
  return long_run.fits();
}

}  // namespace fastmeta
