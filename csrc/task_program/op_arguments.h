// Arguments of one call of an op of the task program, as pointers: the input of every
// implementation. T tasks; theta [P] or [T, P], of which A are adapted; examples x [B, ...] and
// targets of every task.
#pragma once

#include <cstdint>
#include <vector>

#include "common/cuda/tf32.h"
#include "common/dtype.h"
#include "task_program/task_arrays.h"

namespace fastmeta {

enum class OpKind {
  kForward,        // outputs of the queries at theta
  kGradient,       // and their loss, and its gradient
  kHvp,            // products of the curvature of the support's loss with vectors
  kAdapt,          // theta_K
  kAdaptBackward,  // gradient before the K steps from `upstream`, the gradient after them
  kMeta,           // the query loss after K steps, and its gradient
};

// A set of examples. Strides are in elements; 0: all tasks share it.
struct ExampleSet {
  int64_t count = 0;
  const void* x = nullptr;  // [T, B, elements]
  int64_t x_stride = 0;
  const void* targets = nullptr;  // [T, B] int64 labels, or [T, B, outputs]
  int64_t targets_stride = 0;
  const void* weight = nullptr;  // [T, B], or none
  int64_t weight_stride = 0;
};

struct OpArguments {
  OpKind kind;
  Dtype dtype;
  int64_t tasks = 0;
  Program program;
  const int64_t* code = nullptr;  // the words that the program was read from
  int64_t code_words = 0;
  MetaOptions options{};
  bool keeps_states = false, gradient = false;
  Tf32 tf32;  // on CUDA

  const void* theta = nullptr;
  int64_t theta_stride = 0;
  const void* frozen = nullptr;
  const void* lr = nullptr;  // [K or 1, T or 1, A or 1]
  int64_t lr_step_stride = 0, lr_task_stride = 0;
  bool lr_per_parameter = false;
  ExampleSet support, query;
  double scale = 1;                  // of the meta-loss: 1/T for a mean
  std::vector<double> step_weights;  // K, or none: only the last step counts
  const void* given = nullptr;       // [T, A]: upstream gradient; or vectors [T, N, A]
  int64_t vectors = 1;               // N
  bool gauss_newton = false;         // products with J' H_L J, not with H

  // Results, contiguous, null if not wanted. Tasks that share an input share its gradient.
  void* outputs = nullptr;     // [T, Q, outputs]
  void* loss = nullptr;        // [T]; a task's part of the mean
  void* adapted = nullptr;     // [T, A]
  void* grad_theta = nullptr;  // [P] or [T, P]; or products [T, N, P]
  bool grad_theta_shared = false;
  void* grad_lr = nullptr;       // like lr
  void* grad_support = nullptr;  // like x
  void* grad_query = nullptr;

  // Sizes of a task's own step sizes: elements of a step, from a step to the next, of all steps.
  int64_t lr_row() const { return lr_per_parameter ? program.adapted : 1; }
  int64_t lr_dense_stride() const { return lr_step_stride == 0 ? 0 : lr_row(); }
  int64_t lr_elements() const { return lr_row() * (lr_step_stride == 0 ? 1 : options.steps); }
  int64_t given_elements() const { return vectors * program.adapted; }
  int64_t gradient_elements() const { return vectors * program.parameters; }
  bool has_labels() const { return program.loss.kind == LossKind::kCrossEntropy; }
  bool has_loss() const { return kind != OpKind::kForward; }
  // Targets of an example: its label, or a number for each output.
  int64_t target_elements() const { return has_labels() ? 1 : program.output_elements(); }
  // Whether an example's factor is its share of a mean over the set; a weight has it in itself.
  bool divides_by_examples(const ExampleSet& set) const {
    return program.loss.mean && set.weight == nullptr;
  }
  // The factor of a regression's loss of one element.
  double norm_of_targets(const ExampleSet& set) const {
    const int64_t examples = divides_by_examples(set) ? set.count : 1;
    const auto elements = static_cast<double>(examples * program.output_elements());
    return program.loss.mean ? program.loss.scale / elements : program.loss.scale;
  }
  TaskNeeds needs() const {
    TaskNeeds needs{};
    needs.options = options;
    needs.support = support.count;
    needs.queries = query.count;
    needs.gradient = gradient;
    needs.vectors = vectors;
    needs.keeps_outputs = !step_weights.empty() || needs.tangents();
    needs.keeps_states = keeps_states;
    needs.support_grad = grad_support != nullptr;
    needs.query_grad = grad_query != nullptr;
    needs.lr_per_parameter = lr_per_parameter;
    needs.lr_elements = lr_elements();
    needs.lr_step_stride = lr_dense_stride();
    return needs;
  }
  // Weight of the query loss after k steps.
  double weight(int k) const {
    if (k == options.steps) return scale * (step_weights.empty() ? 1 : step_weights.back());
    return k == 0 || step_weights.empty() ? 0 : scale * step_weights[k - 1];
  }
};

// Runs the op for one task (or one executor's tasks), all of whose inputs are in place.
template <typename Executor>
void run_op(Executor& exec, const OpArguments& args,
            const TaskArrays<typename Executor::storage_t>& task) {
  using storage_t = typename Executor::storage_t;
  const MetaStep<Executor> step(exec, args.program, args.options, task);
  const int steps = args.options.steps;
  exec.map(1, Fill<storage_t>{0, task.loss});
  if (task.grad_lr) exec.map(args.lr_elements(), Fill<storage_t>{0, task.grad_lr});
  switch (args.kind) {
    case OpKind::kForward:
      step.query_outputs();
      break;
    case OpKind::kGradient:
      step.query(0, args.scale, true, false);
      break;
    case OpKind::kHvp:
      step.curvature_products(args.vectors, args.gauss_newton);
      break;
    case OpKind::kAdapt:
      step.adapt();
      break;
    case OpKind::kAdaptBackward:
      // The adapted parameters do not depend on the shared ones directly.
      if (const int64_t shared = args.program.parameters - args.program.adapted; shared > 0) {
        exec.map(shared, Fill<storage_t>{0, task.v.from(args.program.adapted)});
      }
      step.adapt();
      for (int k = steps - 1; k >= 0; --k) step.step_back(k);
      break;
    case OpKind::kMeta:
      step.adapt();
      step.query(steps, args.weight(steps), args.gradient, false);
      for (int k = steps - 1; k >= 0; --k) {
        if (args.gradient) step.step_back(k);
        if (args.weight(k) != 0) step.query(k, args.weight(k), args.gradient, true);
      }
      break;
  }
}

}  // namespace fastmeta
