// Memory of a task: the arrays that one call needs, out of one workspace.
#pragma once

#include "task_program/meta_step.h"

namespace fastmeta {

// Hands out arrays one after the other; without memory, it only counts.
template <typename storage_t>
class BumpAllocator {
 public:
  FASTMETA_HOST_DEVICE BumpAllocator(storage_t* base, int64_t task_stride)
      : base_(base), task_stride_(task_stride) {}

  FASTMETA_HOST_DEVICE Array<storage_t> take(int64_t count) {
    Array<storage_t> array;
    if (base_ != nullptr) array = {base_ + used_, task_stride_};
    used_ += (count + kAlign - 1) / kAlign * kAlign;
    return array;
  }
  FASTMETA_HOST_DEVICE int64_t used() const { return used_; }

 private:
  static constexpr int64_t kAlign = sizeof(storage_t) <= 8 ? 64 / sizeof(storage_t) : 1;
  storage_t* base_;
  int64_t task_stride_;
  int64_t used_ = 0;
};

// Properties of a call that decide which arrays a task needs.
struct TaskNeeds {
  MetaOptions options;
  int64_t support, queries;       // examples; 0 queries: no query pass
  bool gradient;                  // a backward pass: v
  int64_t vectors;                // rows of v and of the direction; 0: they have memory already
  bool keeps_outputs;             // of the last step: its values are overwritten
  bool keeps_states;              // theta_1 .. theta_K are read again
  bool support_grad, query_grad;  // of the examples
  bool lr_per_parameter;
  int64_t lr_elements, lr_step_stride;  // step sizes of a task, densely; 0: steps share them

  FASTMETA_HOST_DEVICE bool tangents() const {
    return gradient && support > 0 && !options.first_order;
  }
  // Whether Hessian-vector products have a direction array of their own: given, or v times step
  // sizes.
  FASTMETA_HOST_DEVICE bool separate_direction(const Program& program) const {
    return options.steps == 0 || lr_per_parameter || !program.writes_once;
  }
  // Whether g_k is made in the memory of theta_{k+1}: nobody asks for g_k itself, and if it is
  // recomputed in the backward pass, theta_{k+1} is no longer needed.
  FASTMETA_HOST_DEVICE bool shares_grads() const {
    return keeps_states && options.steps > 0 && !options.lr_grad;
  }
  FASTMETA_HOST_DEVICE bool keeps_grads() const {
    return gradient && options.lr_grad && (options.first_order || options.keeps_steps);
  }
};

// Takes values and gradients of a pass over the examples, `steps` times.
template <typename storage_t>
FASTMETA_HOST_DEVICE void take_values(BumpAllocator<storage_t>& allocator, const Program& program,
                                      int64_t examples, int64_t steps,
                                      Activations<storage_t>& arrays, int64_t& step_stride) {
  const int64_t one = examples * program.example_elements;
  arrays.value = allocator.take(2 * one * steps);
  arrays.delta = arrays.value.from(one);
  step_stride = steps > 1 ? 2 * one : 0;
  arrays.row_loss = allocator.take(examples);
}

// Takes arrays of the query passes and of Hessian-vector products. They never work together: the
// values of one and the tangents of the other share memory.
template <typename storage_t>
FASTMETA_HOST_DEVICE void take_query_and_tangents(BumpAllocator<storage_t>& allocator,
                                                  const Program& program, const TaskNeeds& needs,
                                                  TaskArrays<storage_t>& task) {
  const int64_t of_query = needs.queries * program.example_elements;
  const int64_t of_tangents = needs.tangents() ? needs.support * program.example_elements : 0;
  const auto block = allocator.take(2 * (of_query > of_tangents ? of_query : of_tangents));
  if (needs.queries > 0) {
    task.query_arrays.value = block;
    task.query_arrays.delta = block.from(of_query);
    task.query_arrays.row_loss = allocator.take(needs.queries);
  }
  if (needs.tangents()) {
    task.support_arrays.value_dot = block;
    task.support_arrays.delta_dot = block.from(of_tangents);
  }
}

// Takes everything but inputs: start, frozen, step sizes, examples.
template <typename storage_t>
FASTMETA_HOST_DEVICE TaskArrays<storage_t> take_task_arrays(BumpAllocator<storage_t>& allocator,
                                                            const Program& program,
                                                            const TaskNeeds& needs) {
  TaskArrays<storage_t> task;
  const int64_t adapted = program.adapted, input = program.values[0].elements;
  const int64_t steps = needs.options.steps;
  task.loss = allocator.take(1);
  if (steps > 0) {
    task.states = allocator.take(adapted * (needs.keeps_states ? steps : 1));
    task.state_stride = needs.keeps_states ? adapted : 0;
  }
  if (steps > 0 && needs.shares_grads()) {
    task.grads = task.states;
    task.grads_stride = task.state_stride;
  } else if (steps > 0) {
    task.grads = allocator.take(adapted * (needs.keeps_grads() ? steps : 1));
    task.grads_stride = needs.keeps_grads() ? adapted : 0;
  }
  if (needs.support > 0) {
    const bool keeps = needs.tangents() && needs.options.keeps_steps && steps > 0;
    take_values(allocator, program, needs.support, keeps ? steps : 1, task.support_arrays,
                task.step_stride);
  }
  if (needs.gradient) task.v = allocator.take(needs.vectors * program.parameters);
  take_query_and_tangents(allocator, program, needs, task);
  if (needs.tangents()) {
    if (needs.separate_direction(program)) {
      task.direction = allocator.take(needs.vectors * adapted);
    }
    if (needs.support_grad) {
      task.support_arrays.input_delta_dot = allocator.take(needs.support * input);
      task.grad_support = allocator.take(needs.support * input);
    }
  }
  if (needs.queries > 0) {
    if (needs.keeps_outputs) {
      task.outputs = allocator.take(needs.queries * program.output_elements());
    }
    if (needs.query_grad) {
      task.query_arrays.input_delta = allocator.take(needs.queries * input);
      task.grad_query = allocator.take(needs.queries * input);
    }
  }
  if (needs.gradient && needs.options.lr_grad) {
    task.grad_lr = allocator.take(needs.lr_elements);
    task.grad_lr_stride = needs.lr_step_stride;
  }
  return task;
}

}  // namespace fastmeta
