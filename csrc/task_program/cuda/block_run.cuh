// A whole call in one kernel: the arrays in shared memory, and the list of its steps.
//
// A meta-step of a 1-40-40-1 MLP on 10 + 10 examples is 54 steps with 24 waits in 68 KB of shared
// memory for one inner step, 198 with 84 in 148 KB for five. It takes 0.2 and 0.8 million
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
  // Constructor; without a workspace it can only tell whether the task fits, and the workspace's
  // size.
  BlockRun(const OpArguments& args, void* workspace) : args_(args) {
    // Recomputing the steps' values saves shared memory: the second chance to fit.
    fits_ = !args.program.has_images &&
            (plan(args) || (args.options.keeps_steps && plan(made_again(args))));
    Workspace space(workspace);
    if (sums_theta()) v_ = space.take<value_t>(args.tasks * args.program.parameters);
    if (sums_lr()) grad_lr_ = space.take<value_t>(args.tasks * args.lr_elements());
    workspace_bytes_ = space.bytes();
  }

  bool fits() const { return fits_; }
  int64_t workspace_bytes() const { return workspace_bytes_; }

  int run(void* stream) {
    transfer_in();
    transfer_out();
    // j_ goes by value as the kernel's argument: no copy to the device beforehand.
    int error = launch(block_kernel<value_t, bytes>, args_.tasks, threads(), shared_bytes_,
                       static_cast<cudaStream_t>(stream), j_);
    const auto add_up = [&](const value_t* rows, int64_t count, void* target) {
      // Tasks that share theta or lr: each block wrote a row, summed here in order.
      if (error != cudaSuccess || rows == nullptr) return;
      error = launch_sum_over_tasks(args_.tasks, count, rows, count, static_cast<value_t*>(target),
                                    stream);
    };
    add_up(v_, args_.program.parameters, args_.grad_theta);
    add_up(grad_lr_, args_.lr_elements(), args_.grad_lr);
    return error;
  }

 private:
  using Storage = InShared<value_t>;
  using Numbers = Array<Storage>;
  using Recorder = BlockRecorder<value_t, bytes>;

  bool sums_theta() const { return args_.grad_theta != nullptr && args_.grad_theta_shared; }
  bool sums_lr() const { return args_.grad_lr != nullptr && args_.lr_task_stride == 0; }
  bool has_labels() const { return args_.program.loss.kind == LossKind::kCrossEntropy; }
  bool has_loss() const { return args_.kind != OpKind::kForward; }

  static OpArguments made_again(OpArguments args) {
    args.options.keeps_steps = false;
    return args;
  }

  // Gives every array its place and records the steps; returns whether both fit.
  bool plan(const OpArguments& args) {
    const Program& program = args.program;
    BumpAllocator<Storage> allocator;
    task_ = take_task_arrays(allocator, program, args.needs());
    task_.start = allocator.take(program.parameters);
    task_.frozen = allocator.take(program.frozen);
    const int64_t lr = args.lr == nullptr ? 0 : args.lr_elements();
    task_.step_sizes = {allocator.take(lr), args.lr_dense_stride(), args.lr_per_parameter};
    for (auto [set, examples] :
         {std::pair(&args.support, &task_.support), std::pair(&args.query, &task_.query)}) {
      examples->count = set->count;
      examples->norm = allocator.take(1);
      examples->x = allocator.take(set->count * program.values[0].elements);
      examples->targets = allocator.take(set->count * target_elements());
    }
    shared_bytes_ = allocator.used() * static_cast<int64_t>(sizeof(value_t));
    if (shared_bytes_ > largest_shared_memory()) return false;
    // A first plan that did not fit may have left steps.
    j_.steps.used = 0;
    Recorder recorder(j_.steps);
    record_norm(recorder, args.support, task_.support);
    record_norm(recorder, args.query, task_.query);
    run_op(recorder, args, task_);
    return recorder.fits();
  }

  int64_t target_elements() const { return has_labels() ? 1 : args_.program.output_elements(); }

  void record_norm(Recorder& recorder, const ExampleSet& set, const Examples<Storage>& examples) {
    if (set.count == 0 || !has_loss()) return;
    const auto& loss = args_.program.loss;
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
    const Program& program = args_.program;
    j_.ins = 0;
    add_in(args_.theta, args_.theta_stride, program.parameters, task_.start);
    add_in(args_.frozen, 0, program.frozen, task_.frozen);
    if (args_.lr != nullptr) {
      j_.in[j_.ins++] = {const_cast<void*>(args_.lr),
                         args_.lr_task_stride,
                         args_.lr_row(),
                         args_.lr_step_stride,
                         static_cast<int>(args_.lr_elements()),
                         task_.step_sizes.lr.offset};
    }
    add_in(args_.given, program.parameters, program.parameters,
           args_.kind == OpKind::kHvp ? task_.direction : task_.v);
    const int64_t input = program.values[0].elements;
    add_in(args_.support.x, args_.support.x_stride, args_.support.count * input, task_.support.x);
    add_in(args_.query.x, args_.query.x_stride, args_.query.count * input, task_.query.x);
    // Targets are the last transfers, so one index separates labels from numbers.
    j_.first_labels = has_labels() ? j_.ins : kMostTransfers;
    j_.ignored = static_cast<int64_t>(program.loss.b);
    for (auto [set, examples] :
         {std::pair(&args_.support, &task_.support), std::pair(&args_.query, &task_.query)}) {
      if (has_loss()) {
        add_in(set->targets, set->targets_stride, set->count * target_elements(),
               examples->targets);
      }
    }
  }

  // Adds a transfer to rows of `count` numbers, if wanted.
  void add_out(const Numbers& source, int64_t count, void* target) {
    if (target == nullptr || count == 0) return;
    j_.out[j_.outs++] = {target, count, count, 0, static_cast<int>(count), source.offset};
  }

  void transfer_out() {
    const Program& program = args_.program;
    const int64_t parameters = program.parameters, input = program.values[0].elements;
    // Only to find the output's offset.
    const Network<Storage> net{program, {}, {}, task_.query, task_.query_arrays};
    const int last = args_.options.steps - 1;
    j_.outs = 0;
    add_out(task_.outputs ? task_.outputs : net.value(program.output),
            args_.query.count * program.output_elements(), args_.outputs);
    add_out(task_.loss, 1, args_.loss);
    add_out(last < 0 ? task_.start : task_.states.from(last * task_.state_stride), parameters,
            args_.adapted);
    add_out(task_.grad_support, args_.support.count * input, args_.grad_support);
    add_out(task_.grad_query, args_.query.count * input, args_.grad_query);
    add_out(task_.v, parameters, sums_theta() ? v_ : args_.grad_theta);
    if (sums_lr()) {
      add_out(task_.grad_lr, args_.lr_elements(), grad_lr_);
    } else if (args_.grad_lr != nullptr) {
      const int64_t row = args_.lr_row();
      j_.out[j_.outs++] = {args_.grad_lr,
                           row,
                           row,
                           args_.lr_step_stride,
                           static_cast<int>(args_.lr_elements()),
                           task_.grad_lr.offset};
    }
  }

  // Threads of a block: one for every 4 parameters.
  int threads() const {
    const int64_t warps = ceil_div(args_.program.parameters, 4 * kWarp);
    return static_cast<int>(std::clamp<int64_t>(warps * kWarp, 64, kMostBlockThreads));
  }

  const OpArguments& args_;
  TaskArrays<Storage> task_;
  BlockArguments<value_t, bytes> j_{};
  value_t *v_ = nullptr, *grad_lr_ = nullptr;
  bool fits_;
  int64_t shared_bytes_ = 0, workspace_bytes_ = 0;
};

// Lengths of lists of steps: one fits into the 4 KiB of arguments that all drivers take, the other
// into the 32764 bytes since CUDA 12.1.
inline constexpr int kShortList = 3400, kLongList = 20000;

// Calls body(run) with a run that fits; returns whether one does.
template <typename value_t, typename Body>
bool with_block_run(const OpArguments& args, void* workspace, const Body& body) {
  static_assert(sizeof(BlockArguments<value_t, kShortList>) <= 4096 &&
                sizeof(BlockArguments<value_t, kLongList>) <= 32764);
  // The short list first: fewer bytes of arguments go with each launch.
  BlockRun<value_t, kShortList> short_run(args, workspace);
  if (short_run.fits()) {
    body(short_run);
    return true;
  }
  BlockRun<value_t, kLongList> long_run(args, workspace);
  if (long_run.fits()) body(long_run);
  return long_run.fits();
}

}  // namespace fastmeta
