// A network with one set of weights for all examples, and its derivatives for any cotangent, on the
// passes of the task program (task_program/passes.h). Batch norms take the statistics of a task's
// examples: T tasks are T batches, an ordinary encoder call is one. With J the derivative of the
// outputs y [T, B, n] in theta [P] and x [T, B, ...]:
//
//   encode                    y = f(theta, x)
//   encode_backward           (dtheta, dx) = J' dy
//   encode_backward_backward  of <dtheta, theta_dot> + <dx, x_dot> = <dy, J (theta_dot, x_dot)>:
//                             its gradients with respect to dy, which is J (theta_dot, x_dot), to
//                             theta and to x
//
// `encode` keeps the values of its pass, [T, K], which the other two read. If nobody will ask for a
// gradient of x, convolutions of few channels are fused with the norm and the pool behind them, and
// their outputs are not kept (task_program/cpu/fused_band.h). All three ops are told so alike.
//
// `statistics` [T, S] are mean and unbiased variance, C numbers each, of every batch norm in the
// order of the code: what running statistics are updated with.
#pragma once

#include "task_program/program/program.h"

namespace fastmeta {

struct EncoderArguments {
  Program program;
  int64_t tasks, examples;  // T, B

  const void* theta = nullptr;
  const void* frozen = nullptr;
  const void* x = nullptr;
  const void* grad_outputs = nullptr;  // [T, B, n]
  const void* theta_dot = nullptr;     // [P], or none: zero
  const void* x_dot = nullptr;         // as x, or none: zero

  void* kept = nullptr;  // none: nobody reads it
  // Results, null if not wanted.
  void* outputs = nullptr;
  void* statistics = nullptr;
  void* grad_theta = nullptr;
  void* grad_x = nullptr;
  void* outputs_dot = nullptr;

  bool has_tangents() const { return outputs_dot != nullptr; }
  int64_t input_elements() const { return examples * program.values[0].elements; }
  int64_t output_elements() const { return examples * program.output_elements(); }
  // Elements of all values of a task, K.
  int64_t kept_elements() const { return examples * program.example_elements; }
  int64_t statistics_elements() const {
    int64_t sum = 0;
    for (int k = 0; k < program.instruction_count; ++k) {
      if (is_batch_norm(program.instructions[k])) sum += 2 * program.instructions[k].inputs;
    }
    return sum;
  }
};

}  // namespace fastmeta
