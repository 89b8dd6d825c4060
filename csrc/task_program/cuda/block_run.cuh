// A whole call in one kernel: its plan, and the arrays outside of shared memory.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>

#include "common/ceil_div.h"
#include "common/cuda/workspace.h"
#include "task_program/cuda/block_kernel.cuh"
#include "task_program/cuda/block_plan.cuh"
#include "task_program/cuda/sum_over_tasks.h"

namespace fastmeta {

template <typename value_t>
class BlockRun {
 public:
  // Constructor; without a workspace it can only tell the workspace's size.
  BlockRun(const OpArguments& args, const BlockPlan<value_t>& plan, void* workspace)
      : args_(args), plan_(plan), task_(plan.task) {
    Workspace space(workspace);
    if (sums_theta()) v_ = space.take<value_t>(args.tasks * args.program.parameters);
    if (sums_lr()) grad_lr_ = space.take<value_t>(args.tasks * args.lr_elements());
    workspace_bytes_ = space.bytes();
  }

  int64_t workspace_bytes() const { return workspace_bytes_; }

  int run(void* stream) const {
    // The short list if it has room: fewer bytes of arguments go with each launch. Beside it there is
    // none for the transfers of weights.
    const bool has_weights = args_.support.weight != nullptr || args_.query.weight != nullptr;
    int error = plan_.is_short() && !has_weights ? launch_with<kShortList>(stream)
                                                 : launch_with<kLongList>(stream);
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

  bool sums_theta() const { return args_.grad_theta != nullptr && args_.grad_theta_shared; }
  bool sums_lr() const { return args_.grad_lr != nullptr && args_.lr_task_stride == 0; }

  template <int bytes>
  int launch_with(void* stream) const {
    using Arguments = BlockArguments<value_t, bytes>;
    static_assert(sizeof(Arguments) <= (bytes == kShortList ? 4096 : 32764));
    // By value as the kernel's argument: no copy to the device beforehand.
    Arguments j{};
    transfer_in(j);
    transfer_out(j);
    j.steps.used = static_cast<int>(plan_.steps.size());
    std::memcpy(j.steps.data, plan_.steps.data(), plan_.steps.size());
    return launch(block_kernel<value_t, bytes>, args_.tasks, threads(), plan_.shared_bytes,
                  static_cast<cudaStream_t>(stream), j);
  }

  template <typename Arguments>
  static void add_in(Arguments& j, const void* source, int64_t task_stride, int64_t count,
                     const Numbers& target) {
    if (source == nullptr || count == 0) return;
    j.in[j.ins++] = {const_cast<void*>(source), task_stride,  count, 0,
                     static_cast<int>(count),   target.offset};
  }

  template <typename Arguments>
  void transfer_in(Arguments& j) const {
    const Program& program = args_.program;
    j.ins = 0;
    add_in(j, args_.theta, args_.theta_stride, program.parameters, task_.start);
    add_in(j, args_.frozen, 0, program.frozen, task_.frozen);
    if (args_.lr != nullptr) {
      j.in[j.ins++] = {const_cast<void*>(args_.lr),
                       args_.lr_task_stride,
                       args_.lr_row(),
                       args_.lr_step_stride,
                       static_cast<int>(args_.lr_elements()),
                       task_.step_sizes.lr.offset};
    }
    add_in(j, args_.given, args_.given_elements(), args_.given_elements(),
           args_.kind == OpKind::kHvp ? task_.direction : task_.v);
    const int64_t input = program.values[0].elements;
    add_in(j, args_.support.x, args_.support.x_stride, args_.support.count * input,
           task_.support.x);
    add_in(j, args_.query.x, args_.query.x_stride, args_.query.count * input, task_.query.x);
    add_in(j, args_.support.weight, args_.support.weight_stride, args_.support.count,
           task_.support.weight);
    add_in(j, args_.query.weight, args_.query.weight_stride, args_.query.count, task_.query.weight);
    // Targets are the last transfers, so one index separates labels from numbers.
    j.first_labels = args_.has_labels() ? j.ins : kMostWithWeights;
    j.ignored = static_cast<int64_t>(program.loss.b);
    for (auto [set, examples] :
         {std::pair(&args_.support, &task_.support), std::pair(&args_.query, &task_.query)}) {
      if (args_.has_loss()) {
        add_in(j, set->targets, set->targets_stride, set->count * args_.target_elements(),
               examples->targets);
      }
    }
  }

  // Adds a transfer to rows of `count` numbers, if wanted.
  template <typename Arguments>
  static void add_out(Arguments& j, const Numbers& source, int64_t count, void* target) {
    if (target == nullptr || count == 0) return;
    j.out[j.outs++] = {target, count, count, 0, static_cast<int>(count), source.offset};
  }

  template <typename Arguments>
  void transfer_out(Arguments& j) const {
    const Program& program = args_.program;
    const int64_t input = program.values[0].elements;
    // Only to find the output's offset.
    const Network<Storage> net{program, {}, {}, task_.query, task_.query_arrays};
    const int last = args_.options.steps - 1;
    j.outs = 0;
    add_out(j, task_.outputs ? task_.outputs : net.value(program.output),
            args_.query.count * program.output_elements(), args_.outputs);
    add_out(j, task_.loss, 1, args_.loss);
    add_out(j, last < 0 ? task_.start : task_.states.from(last * task_.state_stride),
            program.adapted, args_.adapted);
    add_out(j, task_.grad_support, args_.support.count * input, args_.grad_support);
    add_out(j, task_.grad_query, args_.query.count * input, args_.grad_query);
    add_out(j, task_.v, args_.gradient_elements(), sums_theta() ? v_ : args_.grad_theta);
    if (sums_lr()) {
      add_out(j, task_.grad_lr, args_.lr_elements(), grad_lr_);
    } else if (args_.grad_lr != nullptr) {
      const int64_t row = args_.lr_row();
      j.out[j.outs++] = {args_.grad_lr,
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
  const BlockPlan<value_t>& plan_;
  const TaskArrays<Storage>& task_;
  value_t *v_ = nullptr, *grad_lr_ = nullptr;
  int64_t workspace_bytes_ = 0;
};

// Bytes of workspace of a call; -1 if a task does not fit into a block.
template <typename value_t>
int64_t workspace_of_blocks(const OpArguments& args) {
  const auto plan = block_plan<value_t>(args);
  return plan ? BlockRun<value_t>(args, *plan, nullptr).workspace_bytes() : -1;
}

template <typename value_t>
int run_blocks(const OpArguments& args, void* workspace, void* stream) {
  const auto plan = block_plan<value_t>(args);
  return plan ? BlockRun<value_t>(args, *plan, workspace).run(stream) : cudaErrorInvalidValue;
}

}  // namespace fastmeta
