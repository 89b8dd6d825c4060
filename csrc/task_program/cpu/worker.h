// One thread's share of a call: its memory, and the copies of each task's numbers in and out.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "common/cpu/transpose.h"
#include "common/cpu/widen.h"
#include "task_program/cpu/lanes.h"
#include "task_program/cpu/thread.h"
#include "task_program/op_arguments.h"

namespace fastmeta {

// Types that depend on the number of lanes.
template <typename value_t, bool in_lanes>
struct CpuKind {
  using Vec = at::vec::Vectorized<value_t>;
  using Executor = std::conditional_t<in_lanes, CpuLanes<value_t>, CpuThread<value_t>>;
  using storage_t = typename Executor::storage_t;
  static constexpr int64_t kLanes = in_lanes ? Vec::size() : 1;
};

template <typename value_t, bool in_lanes>
class CpuWorker {
 public:
  using Kind = CpuKind<value_t, in_lanes>;
  using Executor = typename Kind::Executor;
  using storage_t = typename Kind::storage_t;
  static constexpr int64_t kLanes = Kind::kLanes;

  // Constructor; memory has bytes(args), aligned to 64. Without memory nothing can be run.
  CpuWorker(const OpArguments& args, void* memory, bool shares_threads) : args_(args) {
    BumpAllocator<storage_t> allocator(static_cast<storage_t*>(memory), 0);
    allocate(allocator, shares_threads);
    bytes_ = allocator.used() * static_cast<int64_t>(sizeof(storage_t));
    // Only the size was wanted.
    if (memory == nullptr) return;
    // The workspace is not initialised.
    if (sum_theta_) std::fill_n(numbers(sum_theta_), args.program.parameters, value_t(0));
    if (sum_lr_) std::fill_n(numbers(sum_lr_), args.lr_elements(), value_t(0));
    // Once for all of this worker's tasks.
    load_shared();
  }

  static int64_t bytes(const OpArguments& args, bool shares_threads) {
    return CpuWorker(args, nullptr, shares_threads).bytes_;
  }

  // Runs `tasks` tasks, at most kLanes, from `first` on.
  void run(int64_t first, int64_t tasks) {
    first_ = first;
    tasks_ = tasks;
    load_examples(args_.support, task_.support);
    load_examples(args_.query, task_.query);
    if (args_.theta_stride != 0) {
      task_.start = loaded(args_.theta, args_.theta_stride, args_.program.parameters, start_room_);
    }
    if (args_.lr_task_stride != 0) load_step_sizes();
    if constexpr (!in_lanes) work_in_results();
    if (args_.given != nullptr) load_given();
    run_op(executor_, args_, task_);
    store_results();
  }

  // Sums over this worker's tasks, of gradients that tasks share.
  const value_t* sum_theta() const { return numbers(sum_theta_); }
  const value_t* sum_lr() const { return numbers(sum_lr_); }

 private:
  using Vec = at::vec::Vectorized<value_t>;

  static value_t* numbers(const Array<storage_t>& a) { return reinterpret_cast<value_t*>(a.data); }
  static int64_t in_storage(int64_t count) { return (count + kLanes - 1) / kLanes; }

  void allocate(BumpAllocator<storage_t>& allocator, bool shares_threads) {
    const Program& program = args_.program;
    auto needs = args_.needs();
    if (!in_lanes && args_.kind == OpKind::kHvp) needs.vectors = 0;
    task_ = take_task_arrays(allocator, program, needs);
    if (args_.grad_theta_shared && args_.grad_theta != nullptr) {
      sum_theta_ = allocator.take(in_storage(program.parameters));
    }
    if (sums_lr()) sum_lr_ = allocator.take(in_storage(args_.lr_elements()));
    allocate_examples(allocator, args_.support, task_.support, support_room_);
    allocate_examples(allocator, args_.query, task_.query, query_room_);
    if constexpr (in_lanes) {
      start_room_ = allocator.take(program.parameters);
      frozen_room_ = allocator.take(program.frozen);
      lr_room_ = allocator.take(args_.lr_elements());
    } else {
      const auto scratch = allocator.take(Executor::scratch_elements(program, shares_threads));
      executor_ = Executor(scratch.data, shares_threads);
    }
  }

  bool sums_lr() const { return args_.grad_lr != nullptr && args_.lr_task_stride == 0; }

  void allocate_examples(BumpAllocator<storage_t>& allocator, const ExampleSet& set,
                         Examples<storage_t>& examples, Array<storage_t>& room) {
    examples.count = set.count;
    if (set.count == 0) return;
    examples.norm = allocator.take(1);
    if (args_.has_loss() && (in_lanes || args_.has_labels())) {
      examples.targets = allocator.take(set.count * args_.target_elements());
    }
    if (in_lanes) {
      room = allocator.take(set.count * args_.program.values[0].elements);
      if (set.weight != nullptr) examples.weight = allocator.take(set.count);
    }
  }

  // Array that this worker's tasks read: a filled copy; a single task needs no copy.
  Array<storage_t> loaded(const void* source, int64_t stride, int64_t count,
                          const Array<storage_t>& room) const {
    const auto* begin = static_cast<const value_t*>(source) + first_ * stride;
    if constexpr (in_lanes) {
      if (stride == 0) {
        // All lanes get the shared number.
        for (int64_t i = 0; i < count; ++i) room.data[i] = Vec(begin[i]);
      } else {
        transpose(tasks_, count, begin, stride, numbers(room), kLanes);
      }
      return room;
    } else {
      // Nothing writes to inputs; Array has no const form.
      return {const_cast<value_t*>(begin), 0};
    }
  }

  void load_shared() {
    const Program& program = args_.program;
    task_.step_sizes.per_parameter = args_.lr_per_parameter;
    if (args_.theta_stride == 0) {
      task_.start = loaded(args_.theta, 0, program.parameters, start_room_);
    }
    if (program.frozen > 0) task_.frozen = loaded(args_.frozen, 0, program.frozen, frozen_room_);
    if (args_.lr != nullptr && args_.lr_task_stride == 0) load_step_sizes();
  }

  void load_step_sizes() {
    if constexpr (in_lanes) {
      const int64_t rows = args_.lr_step_stride == 0 ? 1 : args_.options.steps;
      for (int64_t k = 0; k < rows; ++k) {
        const auto* row = static_cast<const value_t*>(args_.lr) + k * args_.lr_step_stride;
        loaded(row, args_.lr_task_stride, args_.lr_row(), lr_room_.from(k * args_.lr_row()));
      }
      task_.step_sizes.lr = lr_room_;
      task_.step_sizes.step_stride = args_.lr_dense_stride();
    } else {
      // Read in place with its own stride from step to step.
      task_.step_sizes.lr = loaded(args_.lr, args_.lr_task_stride, 0, {});
      task_.step_sizes.step_stride = args_.lr_step_stride;
    }
  }

  void load_examples(const ExampleSet& set, Examples<storage_t>& examples) const {
    if (set.count == 0) return;
    const int64_t elements = set.count * args_.program.values[0].elements;
    const bool is_support = &set == &args_.support;
    examples.x = loaded(set.x, set.x_stride, elements, is_support ? support_room_ : query_room_);
    if (!args_.has_loss()) return;
    if (set.weight != nullptr) {
      examples.weight = loaded(set.weight, set.weight_stride, set.count, examples.weight);
    }
    if (args_.has_labels()) {
      load_labels(set, examples);
      return;
    }
    const int64_t outputs = set.count * args_.program.output_elements();
    examples.targets = loaded(set.targets, set.targets_stride, outputs, examples.targets);
    fill_norm(examples, args_.norm_of_targets(set));
  }

  void fill_norm(const Examples<storage_t>& examples, double value) const {
    std::fill_n(numbers(examples.norm), kLanes, static_cast<value_t>(value));
  }

  void load_labels(const ExampleSet& set, const Examples<storage_t>& examples) const {
    const auto& loss = args_.program.loss;
    const auto ignored = static_cast<int64_t>(loss.b);
    // Lanes without a task get a finite number too.
    fill_norm(examples, loss.scale);
    for (int64_t lane = 0; lane < tasks_; ++lane) {
      const auto* labels =
          static_cast<const int64_t*>(set.targets) + (first_ + lane) * set.targets_stride;
      int64_t counted = 0, absent = 0;
      for (int64_t r = 0; r < set.count; ++r) {
        const int64_t label = labels[r] == ignored ? kIgnoredLabel : labels[r];
        counted += label < 0 ? 0 : 1;
        absent += label == kAbsent ? 1 : 0;
        numbers(examples.targets)[r * kLanes + lane] = static_cast<value_t>(label);
      }
      numbers(examples.norm)[lane] =
          static_cast<value_t>(norm_of_labels(loss.scale, args_.divides_by_examples(set),
                                              static_cast<double>(counted), absent == set.count));
    }
  }

  // Results that are returned unchanged are computed in place.
  void work_in_results() {
    const int64_t row = first_ * args_.gradient_elements();
    if (args_.grad_theta_shared || args_.grad_theta == nullptr) return;
    task_.v = {static_cast<value_t*>(args_.grad_theta) + row, 0};
  }

  // Loads the vectors of curvature products, or the gradient after the last step.
  void load_given() {
    const int64_t count = args_.given_elements();
    if (args_.kind == OpKind::kHvp) {
      task_.direction = loaded(args_.given, count, count, task_.direction);
    } else {
      const auto source = loaded(args_.given, count, count, task_.v);
      // v is overwritten; the caller's gradient must not be.
      if constexpr (!in_lanes) std::copy_n(source.data, count, task_.v.data);
    }
  }

  // Stores rows of `count` numbers to the tasks' places in a result [T, count], if wanted.
  void store(const Array<storage_t>& source, int64_t count, void* result) const {
    if (result == nullptr) return;
    auto* target = static_cast<value_t*>(result) + first_ * count;
    if constexpr (in_lanes) {
      transpose(count, tasks_, numbers(source), kLanes, target, count);
    } else if (source.data != target) {
      std::copy_n(source.data, count, target);
    }
  }

  void add_up(const Array<storage_t>& source, int64_t count, const Array<storage_t>& sums) const {
    value_t* target = numbers(sums);
    if constexpr (in_lanes) {
      // Transposed, so that each task's numbers add up in the order of tasks.
      alignas(64) value_t block[kLanes * kLanes];
      for (int64_t i = 0; i < count; i += kLanes) {
        const int64_t n = std::min<int64_t>(kLanes, count - i);
        transpose(n, kLanes, numbers(source.from(i)), kLanes, block, kLanes);
        Vec sum = Vec::loadu(target + i, n);
        for (int64_t lane = 0; lane < tasks_; ++lane) sum = sum + Vec::loadu(block + lane * kLanes);
        sum.store(target + i, n);
      }
    } else {
      at::vec::map2<value_t>([](Vec a, Vec b) { return a + b; }, target, target, source.data,
                             count);
    }
  }

  void store_results() const {
    const Program& program = args_.program;
    const int64_t input = program.values[0].elements, outputs = program.output_elements();
    if (args_.outputs != nullptr) {
      const Network<storage_t> net{program, {}, {}, task_.query, task_.query_arrays};
      store(task_.outputs ? task_.outputs : net.value(program.output), args_.query.count * outputs,
            args_.outputs);
    }
    store(task_.loss, 1, args_.loss);
    const int last = args_.options.steps - 1;
    if (args_.adapted != nullptr) {
      store(last < 0 ? task_.start : task_.states.from(last * task_.state_stride), program.adapted,
            args_.adapted);
    }
    store(task_.grad_support, args_.support.count * input, args_.grad_support);
    store(task_.grad_query, args_.query.count * input, args_.grad_query);
    if (sum_theta_) {
      add_up(task_.v, program.parameters, sum_theta_);
    } else {
      store(task_.v, args_.gradient_elements(), args_.grad_theta);
    }
    if (sum_lr_) {
      add_up(task_.grad_lr, args_.lr_elements(), sum_lr_);
    } else if (args_.grad_lr != nullptr) {
      store_lr();
    }
  }

  // Stores grad_lr [K or 1, T, P or 1].
  void store_lr() const {
    const int64_t row = args_.lr_row(), rows = args_.lr_elements() / row;
    for (int64_t k = 0; k < rows; ++k) {
      auto* target = static_cast<value_t*>(args_.grad_lr) + k * args_.lr_step_stride;
      store(task_.grad_lr.from(k * row), row, target);
    }
  }

  const OpArguments& args_;
  Executor executor_ = make_executor();
  TaskArrays<storage_t> task_;
  Array<storage_t> sum_theta_, sum_lr_, support_room_, query_room_, start_room_, frozen_room_,
      lr_room_;
  int64_t bytes_ = 0, first_ = 0, tasks_ = 0;

  static Executor make_executor() {
    if constexpr (in_lanes) {
      return Executor{};
    } else {
      return Executor(nullptr, false);
    }
  }
};

}  // namespace fastmeta
