// One thread's share of an encoder's op: its memory, and the passes of a task.
#pragma once

#include <algorithm>

#include "task_program/cpu/thread.h"
#include "task_program/encoder/encoder.h"
#include "task_program/passes.h"
#include "task_program/task_arrays.h"

namespace fastmeta {

template <typename value_t>
class EncoderWorker {
 public:
  // Constructor; memory has elements(args), aligned to 64 bytes. Without memory nothing can be run.
  EncoderWorker(const EncoderArguments& args, value_t* memory, bool shares_threads) : args_(args) {
    BumpAllocator<value_t> allocator(memory, 0);
    const int64_t values = args.kept_elements();
    if (args.kept == nullptr) values_ = allocator.take(values);
    if (args.grad_outputs != nullptr) {
      deltas_ = allocator.take(args.examples * args.program.delta_elements);
      sum_ = allocator.take(args.program.parameters);
    }
    if (args.has_tangents()) {
      values_dot_ = allocator.take(values + args.input_elements());
      deltas_dot_ = allocator.take(values);
      input_delta_ = allocator.take(args.input_elements());
    }
    const auto scratch =
        allocator.take(CpuThread<value_t>::scratch_elements(args.program, shares_threads));
    exec_ = CpuThread<value_t>(scratch.data, shares_threads);
    elements_ = allocator.used();
  }

  static int64_t elements(const EncoderArguments& args, bool shares_threads) {
    return EncoderWorker(args, nullptr, shares_threads).elements_;
  }

  // Gradient of theta, summed over the tasks that ran.
  const value_t* sum() const { return sum_.data; }

  void encode(int64_t task) {
    const auto net = network(task);
    Passes(exec_, net).forward();
    store(net.value(args_.program.output), args_.output_elements(), task, args_.outputs);
    if (args_.statistics != nullptr) store_statistics(net, task);
  }

  // Adds to the sum, unless it is this worker's first task.
  void backward(int64_t task, bool adds) {
    auto net = network(task);
    net.arrays.input_delta = row(args_.grad_x, args_.input_elements(), task);
    const Passes passes(exec_, net);
    seed(net, task);
    passes.backward(
        {args_.grad_theta != nullptr ? sum_ : Array<value_t>{}, args_.program.parameters}, adds);
  }

  void backward_backward(int64_t task, bool adds) {
    auto net = network(task);
    if (args_.grad_x != nullptr) {
      net.arrays.input_delta = input_delta_;
      net.arrays.input_delta_dot = row(args_.grad_x, args_.input_elements(), task);
    }
    net.direction = row(args_.theta_dot, 0, task);
    if (args_.x_dot != nullptr) {
      // Behind the tangents of the values, where the program looks for it.
      const auto x_dot = row(args_.x_dot, args_.input_elements(), task);
      std::copy_n(x_dot.data, args_.input_elements(), net.value_dot(0).data);
    }
    const Passes passes(exec_, net);
    seed(net, task);
    passes.backward({{}, args_.program.parameters}, false);
    passes.tangent_forward();
    store(net.value_dot(args_.program.output), args_.output_elements(), task, args_.outputs_dot);
    passes.tangent_backward({sum_, args_.program.parameters}, {adds});
  }

 private:
  // A task's row of an argument or a result; empty if there is none. Array has no const form.
  static Array<value_t> row(const void* data, int64_t elements, int64_t task) {
    auto* begin = static_cast<value_t*>(const_cast<void*>(data));
    return Array<value_t>{begin, 0}.from(task * elements);
  }

  Network<value_t> network(int64_t task) const {
    const auto theta = row(args_.theta, 0, task), frozen = row(args_.frozen, 0, task);
    Network<value_t> net{args_.program, {theta, theta, frozen}, {}, {}, {}};
    net.examples.count = args_.examples;
    net.examples.x = row(args_.x, args_.input_elements(), task);
    net.arrays.value =
        args_.kept == nullptr ? values_ : row(args_.kept, args_.kept_elements(), task);
    net.arrays.delta = deltas_;
    net.arrays.value_dot = values_dot_;
    net.arrays.delta_dot = deltas_dot_;
    return net;
  }

  void seed(const Network<value_t>& net, int64_t task) {
    const auto dy = row(args_.grad_outputs, args_.output_elements(), task);
    std::copy_n(dy.data, args_.output_elements(), net.delta(args_.program.output).data);
  }

  static void store(const Array<value_t>& source, int64_t count, int64_t task, void* result) {
    std::copy_n(source.data, count, row(result, count, task).data);
  }

  void store_statistics(const Network<value_t>& net, int64_t task) const {
    value_t* target = row(args_.statistics, args_.statistics_elements(), task).data;
    for (int k = 0; k < args_.program.instruction_count; ++k) {
      const Instruction& i = args_.program.instructions[k];
      if (!is_batch_norm(i)) continue;
      const NormLayer<value_t> norm{net, i};
      const auto l = norm.arrays(false);
      const value_t *mean = l.statistics.data, *squares = mean + i.inputs;
      const auto shift = net.parameter(i.shift);
      const auto others = static_cast<value_t>(l.set_size() - 1);
      for (int64_t c = 0; c < i.inputs; ++c) {
        *target++ = mean[c] + (shift ? shift.data[c] : value_t(0));
      }
      for (int64_t c = 0; c < i.inputs; ++c) *target++ = squares[c] / others;
    }
  }

  const EncoderArguments& args_;
  CpuThread<value_t> exec_{nullptr, false};
  Array<value_t> values_, deltas_, sum_, values_dot_, deltas_dot_, input_delta_;
  int64_t elements_ = 0;
};

}  // namespace fastmeta
