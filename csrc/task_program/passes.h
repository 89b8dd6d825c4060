// The four passes of a batch through a program, on any executor.
#pragma once

#include <type_traits>

#include "task_program/layers/activation.h"
#include "task_program/layers/layer_norm.h"
#include "task_program/layers/linear.h"
#include "task_program/losses.h"
#include "task_program/network.h"

namespace fastmeta {

template <typename Executor>
class Passes {
 public:
  using storage_t = typename Executor::storage_t;
  using Arena = Array<storage_t>;

  FASTMETA_HOST_DEVICE Passes(Executor& exec, const Network<storage_t>& net)
      : exec_(exec), net_(net) {}

  FASTMETA_HOST_DEVICE void forward() const {
    for (int k = 0; k < net_.program.instruction_count; ++k) {
      const Instruction& i = net_.program.instructions[k];
      switch (i.op) {
        case Opcode::kLinear:
          if (i.with_next) {
            const Instruction& next = net_.program.instructions[++k];
            with_activation<Executor>(
                next, [&](const auto& f) { linear(i).forward(exec_, activated(f, next)); });
          } else {
            linear(i).forward(exec_, NoFinish{});
          }
          break;
        case Opcode::kActivation:
          with_activation<Executor>(
              i, [&](const auto& f) { exec_.map(net_.size(i.y), activated(f, i)); });
          break;
        case Opcode::kAdd:
          exec_.map(net_.size(i.y),
                    Sum<storage_t>{net_.value(i.x), net_.value(i.x2), net_.value(i.y)});
          break;
        case Opcode::kLayerNorm:
          LayerNorm<storage_t>{net_, i}.forward(exec_);
          break;
      }
    }
  }

  // target[0] += weight times the loss, where there is a target; its gradient at the outputs where `backward` follows.
  FASTMETA_HOST_DEVICE void loss(Arena target, double weight, bool backward) const {
    auto l = loss_arrays(weight);
    if (!backward) l.dz = {};
    const auto& spec = net_.program.loss;
    if (spec.kind == LossKind::kCrossEntropy) {
      exec_.rows(net_.examples.count, CrossEntropy<storage_t>{l, spec.a});
    } else {
      with_regression_loss(spec, [&](const auto& loss) {
        using Loss = std::decay_t<decltype(loss)>;
        exec_.rows(net_.examples.count, RegressionLoss<Loss, storage_t>{loss, l});
      });
    }
    if (!target) return;
    exec_.reduce(net_.examples.count,
                 WeightedElement<storage_t>{l.row_loss, net_.examples.norm, weight}, target);
  }

  // From the gradient at the outputs: grads [P] = (or +=) the gradient, where wanted, and that of the
  // input. With each element of grads that is complete `update.from(its parameter)` is done.
  template <typename Update = NoUpdate>
  FASTMETA_HOST_DEVICE void backward(Arena grads, bool adds, const Update& update = {}) const {
    if (grads && !adds) clear_uncovered(grads);
    for (int k = net_.program.instruction_count - 1; k >= 0; --k) {
      const Instruction& i = net_.program.instructions[k];
      if (!net_.delta(i.y)) continue;
      switch (i.op) {
        case Opcode::kLinear:
          if (i.with_previous && net_.delta(net_.program.instructions[k - 1].x)) {
            const Instruction& previous = net_.program.instructions[--k];
            with_activation<Executor>(previous, [&](const auto& f) {
              linear(i).backward(exec_, grads, adds, activation_backward(f, previous), update);
            });
          } else {
            linear(i).backward(exec_, grads, adds, NoFinish{}, update);
          }
          break;
        case Opcode::kActivation:
          if (net_.delta(i.x)) {
            with_activation<Executor>(
                i, [&](const auto& f) { exec_.map(net_.size(i.y), activation_backward(f, i)); });
          }
          break;
        case Opcode::kAdd:
          hand_on(i, net_.delta(i.y), net_.delta(i.x), net_.delta(i.x2));
          break;
        case Opcode::kLayerNorm:
          LayerNorm<storage_t>{net_, i}.backward(exec_, grads, adds, update);
          break;
      }
    }
  }

  // Tangents of all values in the direction of the network's theta_dot; after forward().
  FASTMETA_HOST_DEVICE void tangent_forward() const {
    for (int k = 0; k < net_.program.instruction_count; ++k) {
      const Instruction& i = net_.program.instructions[k];
      if (!net_.value_dot(i.y)) continue;
      switch (i.op) {
        case Opcode::kLinear:
          if (i.with_next) {
            const Instruction& next = net_.program.instructions[++k];
            with_activation<Executor>(next, [&](const auto& f) {
              linear(i).tangent_forward(exec_, activation_tangent(f, next));
            });
          } else {
            linear(i).tangent_forward(exec_, NoFinish{});
          }
          break;
        case Opcode::kActivation:
          with_activation<Executor>(
              i, [&](const auto& f) { exec_.map(net_.size(i.y), activation_tangent(f, i)); });
          break;
        case Opcode::kAdd:
          tangent_add(i);
          break;
        case Opcode::kLayerNorm:
          LayerNorm<storage_t>{net_, i}.tangent_forward(exec_);
          break;
      }
    }
  }

  // target [P] takes H theta_dot in, and the tangent of the input's gradient is made; after
  // forward(), loss() and backward() at the same theta, and tangent_forward(). Where no two layers
  // have a parameter in common, target may be theta_dot itself.
  FASTMETA_HOST_DEVICE void tangent_backward(Arena target,
                                             const Accumulation<storage_t>& into) const {
    if (!into.adds && !into.step_size) clear_uncovered(target);
    tangent_of_loss();
    for (int k = net_.program.instruction_count - 1; k >= 0; --k) {
      const Instruction& i = net_.program.instructions[k];
      if (!net_.delta_dot(i.y)) continue;
      switch (i.op) {
        case Opcode::kLinear:
          if (i.with_previous && net_.delta_dot(net_.program.instructions[k - 1].x)) {
            const Instruction& previous = net_.program.instructions[--k];
            with_activation<Executor>(previous, [&](const auto& f) {
              linear(i).tangent_backward(exec_, target, into,
                                         activation_tangent_backward(f, previous));
            });
          } else {
            linear(i).tangent_backward(exec_, target, into, NoFinish{});
          }
          break;
        case Opcode::kActivation:
          if (net_.delta_dot(i.x)) {
            with_activation<Executor>(i, [&](const auto& f) {
              exec_.map(net_.size(i.y), activation_tangent_backward(f, i));
            });
          }
          break;
        case Opcode::kAdd:
          hand_on(i, net_.delta_dot(i.y), net_.delta_dot(i.x), net_.delta_dot(i.x2));
          break;
        case Opcode::kLayerNorm:
          LayerNorm<storage_t>{net_, i}.tangent_backward(exec_, target, into);
          break;
      }
    }
  }

 private:
  // Zeros where no layer will write a gradient.
  FASTMETA_HOST_DEVICE void clear_uncovered(Arena target) const {
    if (net_.program.covers_theta) return;
    exec_.map(net_.program.parameters, Fill<storage_t>{0, target});
  }

  FASTMETA_HOST_DEVICE Linear<storage_t> linear(const Instruction& i) const { return {net_, i}; }

  template <typename Act>
  FASTMETA_HOST_DEVICE ActivationForward<Act, storage_t> activated(const Act& f,
                                                                   const Instruction& i) const {
    return {f, net_.value(i.x), net_.value(i.y)};
  }
  template <typename Act>
  FASTMETA_HOST_DEVICE ActivationSlope<Act, storage_t> activation_backward(
      const Act& f, const Instruction& i) const {
    return {f, net_.value(i.x), net_.delta(i.y), net_.delta(i.x), i.adds_to_x};
  }
  template <typename Act>
  FASTMETA_HOST_DEVICE ActivationSlope<Act, storage_t> activation_tangent(
      const Act& f, const Instruction& i) const {
    return {f, net_.value(i.x), net_.value_dot(i.x), net_.value_dot(i.y)};
  }
  template <typename Act>
  FASTMETA_HOST_DEVICE ActivationTangentBackward<Act, storage_t> activation_tangent_backward(
      const Act& f, const Instruction& i) const {
    return {f,
            net_.value(i.x),
            net_.value_dot(i.x),
            net_.delta(i.y),
            net_.delta_dot(i.y),
            net_.delta_dot(i.x),
            i.adds_to_x};
  }

  FASTMETA_HOST_DEVICE void tangent_add(const Instruction& i) const {
    const Arena a = net_.value_dot(i.x), b = net_.value_dot(i.x2), y = net_.value_dot(i.y);
    if (a && b) {
      exec_.map(net_.size(i.y), Sum<storage_t>{a, b, y});
    } else {
      exec_.map(net_.size(i.y), Copy<storage_t>{a ? a : b, y});
    }
  }

  // The gradient of both summands is that of the sum.
  FASTMETA_HOST_DEVICE void hand_on(const Instruction& i, Arena from, Arena to_x,
                                    Arena to_x2) const {
    if (to_x) exec_.map(net_.size(i.y), Copy<storage_t>{from, to_x, i.adds_to_x});
    if (to_x2) exec_.map(net_.size(i.y), Copy<storage_t>{from, to_x2, i.adds_to_x2});
  }

  FASTMETA_HOST_DEVICE LossArrays<storage_t> loss_arrays(double weight) const {
    const int out = net_.program.output;
    LossArrays<storage_t> l{};
    l.columns = net_.info(out).elements;
    l.weight = weight;
    l.z = net_.value(out);
    l.targets = net_.examples.targets;
    l.norm = net_.examples.norm;
    l.row_loss = net_.arrays.row_loss;
    l.dz = net_.delta(out);
    l.z_dot = net_.value_dot(out);
    l.dz_dot = net_.delta_dot(out);
    return l;
  }

  FASTMETA_HOST_DEVICE void tangent_of_loss() const {
    const auto l = loss_arrays(1);
    const auto& spec = net_.program.loss;
    if (spec.kind == LossKind::kCrossEntropy) {
      exec_.rows(net_.examples.count, CrossEntropyTangent<storage_t>{l});
      return;
    }
    with_regression_loss(spec, [&](const auto& loss) {
      using Loss = std::decay_t<decltype(loss)>;
      exec_.map(net_.size(net_.program.output), RegressionTangent<Loss, storage_t>{loss, l});
    });
  }

  Executor& exec_;
  const Network<storage_t>& net_;
};

}  // namespace fastmeta
