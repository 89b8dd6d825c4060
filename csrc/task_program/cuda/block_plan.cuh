// Plan of a call in one kernel: the places of its arrays in shared memory, and the list of its
// steps. It is made once for calls that are alike; only addresses outside of shared memory are not
// in it.
//
// A meta-step of a 1-40-40-1 MLP on 10 + 10 examples is 54 steps with 24 waits in 35 KB of shared
// memory for one inner step, 198 with 84 in 90 KB for five.
#pragma once

#include <bit>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "common/cuda/multiprocessors.cuh"
#include "common/recently_used.h"
#include "task_program/cuda/block_steps.cuh"

namespace fastmeta {

// Lengths of lists of steps: one fits into the 4 KiB of arguments that all drivers take, the other
// into the 32764 bytes since CUDA 12.1.
inline constexpr int kShortList = 3400, kLongList = 20000;

template <typename value_t>
struct BlockPlan {
  TaskArrays<InShared<value_t>> task;
  int64_t shared_bytes = 0;
  std::vector<char> steps;  // at most kLongList bytes

  bool is_short() const { return steps.size() <= kShortList; }
};

template <typename value_t>
class BlockPlanner {
 public:
  explicit BlockPlanner(const OpArguments& args) : args_(args) {}

  // The plan; null if a task does not fit.
  std::shared_ptr<const BlockPlan<value_t>> made() {
    if (args_.program.has_images) return nullptr;
    // Recomputing the steps' values saves shared memory: the second chance to fit.
    const bool fits = plan(args_) || (args_.options.keeps_steps && plan(made_again(args_)));
    if (!fits) return nullptr;
    plan_.steps.assign(steps_.data, steps_.data + steps_.used);
    return std::make_shared<const BlockPlan<value_t>>(std::move(plan_));
  }

 private:
  using Storage = InShared<value_t>;
  using Recorder = BlockRecorder<value_t, kLongList>;

  static OpArguments made_again(OpArguments args) {
    args.options.keeps_steps = false;
    return args;
  }

  // Gives every array its place and records the steps; returns whether both fit.
  bool plan(const OpArguments& args) {
    const Program& program = args.program;
    auto& task = plan_.task;
    BumpAllocator<Storage> allocator;
    task = take_task_arrays(allocator, program, args.needs());
    task.start = allocator.take(program.parameters);
    task.frozen = allocator.take(program.frozen);
    const int64_t lr = args.lr == nullptr ? 0 : args.lr_elements();
    task.step_sizes = {allocator.take(lr), args.lr_dense_stride(), args.lr_per_parameter};
    for (auto [set, examples] :
         {std::pair(&args.support, &task.support), std::pair(&args.query, &task.query)}) {
      examples->count = set->count;
      examples->norm = allocator.take(1);
      examples->x = allocator.take(set->count * program.values[0].elements);
      examples->targets = allocator.take(set->count * args.target_elements());
      if (set->weight != nullptr) examples->weight = allocator.take(set->count);
    }
    plan_.shared_bytes = allocator.used() * static_cast<int64_t>(sizeof(value_t));
    if (plan_.shared_bytes > largest_shared_memory()) return false;
    // A first plan that did not fit may have left steps.
    steps_.used = 0;
    Recorder recorder(steps_);
    record_norm(recorder, args.support, task.support);
    record_norm(recorder, args.query, task.query);
    run_op(recorder, args, task);
    return recorder.fits();
  }

  void record_norm(Recorder& recorder, const ExampleSet& set, const Examples<Storage>& examples) {
    if (set.count == 0 || !args_.has_loss()) return;
    if (args_.has_labels()) {
      recorder.rows(
          1, NormOfLabels<Storage>{set.count, args_.divides_by_examples(set),
                                   args_.program.loss.scale, examples.targets, examples.norm});
    } else {
      recorder.map(1, Fill<Storage>{args_.norm_of_targets(set), examples.norm});
    }
  }

  const OpArguments& args_;
  BlockPlan<value_t> plan_;
  StepList<kLongList> steps_;
};

// Everything that a plan depends on, besides its number type.
inline std::vector<int64_t> plan_key(const OpArguments& args) {
  std::vector<int64_t> key(args.code, args.code + args.code_words);
  const MetaOptions& options = args.options;
  for (const int64_t number : {
           static_cast<int64_t>(args.kind),
           args.support.count,
           args.query.count,
           static_cast<int64_t>(options.steps),
           int64_t{options.first_order},
           int64_t{options.lr_grad},
           int64_t{options.keeps_steps},
           int64_t{args.keeps_states},
           int64_t{args.gradient},
           args.vectors,
           int64_t{args.gauss_newton},
           int64_t{args.lr != nullptr},
           int64_t{args.lr_per_parameter},
           int64_t{args.lr_step_stride != 0},
           int64_t{args.grad_lr != nullptr},
           int64_t{args.grad_support != nullptr},
           int64_t{args.grad_query != nullptr},
           int64_t{args.support.weight != nullptr},
           int64_t{args.query.weight != nullptr},
           std::bit_cast<int64_t>(args.scale),
           int64_t{largest_shared_memory()},
       }) {
    key.push_back(number);
  }
  for (const double weight : args.step_weights) key.push_back(std::bit_cast<int64_t>(weight));
  return key;
}

// The plan of a call; null if a task does not fit into a block.
template <typename value_t>
std::shared_ptr<const BlockPlan<value_t>> block_plan(const OpArguments& args) {
  using Plan = std::shared_ptr<const BlockPlan<value_t>>;
  constexpr size_t kPlans = 64;
  static RecentlyUsed<std::vector<int64_t>, Plan> plans(kPlans);
  if (args.program.has_images) return nullptr;
  return plans.get(plan_key(args), [&] { return BlockPlanner<value_t>(args).made(); });
}

}  // namespace fastmeta
