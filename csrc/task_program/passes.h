// The four passes of a batch through a program, on any executor.
#pragma once

#include <type_traits>

#include "task_program/layers/activation.h"
#include "task_program/layers/bilinear.h"
#include "task_program/layers/layer_norm.h"
#include "task_program/layers/norm.h"
#include "task_program/layers/pool.h"
#include "task_program/layers/transpose.h"
#include "task_program/losses.h"
#include "task_program/program/network.h"
#include "task_program/unwritten.h"

namespace fastmeta {

template <typename Executor>
class Passes {
 public:
  using storage_t = typename Executor::storage_t;
  using Arena = Array<storage_t>;
  using Gradient = ParameterGradient<storage_t>;

  FASTMETA_HOST_DEVICE Passes(Executor& exec, const Network<storage_t>& net)
      : exec_(exec), net_(net) {}

  FASTMETA_HOST_DEVICE void forward() const {
    for (int k = 0; k < net_.program.instruction_count; ++k) {
      const Instruction& i = instruction(k);
      if (with_fused_band(k, [](const auto& block) { block.forward(); })) {
        ++k;
      } else if (is_bilinear(i)) {
        const Instruction* next = i.with_next ? &instruction(++k) : nullptr;
        with_bilinear(i, [&](const auto& layer) {
          with_finish(
              next, [&](const auto& f) { return activated(f, *next); },
              [&](const auto& finish) { layer.forward(exec_, finish); });
        });
      } else if (i.op == Opcode::kActivation) {
        with_activation<Executor>(
            i, [&](const auto& f) { exec_.map(net_.size(i.y), activated(f, i)); });
      } else if (i.op == Opcode::kAdd) {
        exec_.map(net_.size(i.y),
                  Sum<storage_t>{net_.value(i.x), net_.value(i.x2), net_.value(i.y)});
      } else {
        with_norm(i, [&](const auto& layer) { layer.forward(exec_); });
        visit_linear_layer(i, [&](const auto& layer) { layer.forward(exec_); });
      }
    }
  }

  // Computes target[0] += weight times the loss, if there is a target, and its gradient at the
  // outputs if `backward` follows.
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
    weigh(l.dz, l.row_loss);
    if (!target) return;
    exec_.reduce(net_.examples.count,
                 WeightedElement<storage_t>{l.row_loss, net_.examples.norm, weight}, target);
  }

  // Computes grads = (or +=) the gradient from the gradient at the outputs, if wanted, and the
  // gradient of the input. Runs `update.from(its parameter)` on each element of grads that is
  // complete.
  template <typename Update = NoUpdate>
  FASTMETA_HOST_DEVICE void backward(Gradient grads, bool adds, const Update& update = {}) const {
    if (grads && !adds) {
      copy_unwritten(exec_, net_.program, grads.count, Arena{}, grads.arena);
    }
    for (int k = net_.program.instruction_count - 1; k >= 0; --k) {
      const Instruction& i = instruction(k);
      if (!net_.delta(i.y)) continue;
      if (with_fused_band(k - 1, [&](const auto& b) { b.backward(grads, adds, update); })) {
        --k;
      } else if (is_bilinear(i)) {
        const bool paired = i.with_previous && net_.delta(instruction(k - 1).x);
        const Instruction* previous = paired ? &instruction(--k) : nullptr;
        with_bilinear(i, [&](const auto& layer) {
          with_finish(
              previous, [&](const auto& f) { return activation_backward(f, *previous); },
              [&](const auto& finish) { layer.backward(exec_, grads, adds, finish, update); });
        });
      } else if (i.op == Opcode::kActivation) {
        if (!net_.delta(i.x)) continue;
        with_activation<Executor>(
            i, [&](const auto& f) { exec_.map(net_.size(i.y), activation_backward(f, i)); });
      } else if (i.op == Opcode::kAdd) {
        add_backward(i, net_.delta(i.y), net_.delta(i.x), net_.delta(i.x2));
      } else {
        with_norm(i, [&](const auto& layer) { layer.backward(exec_, grads, adds, update); });
        visit_linear_layer(
            i, [&](const auto& layer) { layer.backward(exec_, net_.delta(i.y), net_.delta(i.x)); });
      }
    }
  }

  // Computes tangents of all values in the direction of the network's theta_dot; after forward().
  FASTMETA_HOST_DEVICE void tangent_forward() const {
    for (int k = 0; k < net_.program.instruction_count; ++k) {
      const Instruction& i = instruction(k);
      if (!net_.value_dot(i.y)) continue;
      if (with_fused_band(k, [](const auto& block) { block.tangent_forward(); })) {
        ++k;
      } else if (is_bilinear(i)) {
        const Instruction* next = i.with_next ? &instruction(++k) : nullptr;
        with_bilinear(i, [&](const auto& layer) {
          with_finish(
              next, [&](const auto& f) { return activation_tangent(f, *next); },
              [&](const auto& finish) { layer.tangent_forward(exec_, finish); });
        });
      } else if (i.op == Opcode::kActivation) {
        with_activation<Executor>(
            i, [&](const auto& f) { exec_.map(net_.size(i.y), activation_tangent(f, i)); });
      } else if (i.op == Opcode::kAdd) {
        tangent_add(i);
      } else {
        with_norm(i, [&](const auto& layer) { layer.tangent_forward(exec_); });
        visit_linear_layer(i, [&](const auto& layer) { layer.tangent_forward(exec_); });
      }
    }
  }

  // Adds H theta_dot to target, and computes the tangent of the input's gradient; after
  // forward(), loss() and backward() at the same theta, and tangent_forward(). If no two layers
  // have a parameter in common, target may be theta_dot itself.
  FASTMETA_HOST_DEVICE void tangent_backward(Gradient target,
                                             const StoreMode<storage_t>& into) const {
    if (!into.adds && !into.step_size) {
      copy_unwritten(exec_, net_.program, target.count, Arena{}, target.arena);
    }
    tangent_of_loss();
    for (int k = net_.program.instruction_count - 1; k >= 0; --k) {
      const Instruction& i = instruction(k);
      if (!net_.delta_dot(i.y)) continue;
      if (with_fused_band(k - 1, [&](const auto& b) { b.tangent_backward(target, into); })) {
        --k;
      } else if (is_bilinear(i)) {
        const bool paired = i.with_previous && net_.delta_dot(instruction(k - 1).x);
        const Instruction* previous = paired ? &instruction(--k) : nullptr;
        with_bilinear(i, [&](const auto& layer) {
          with_finish(
              previous, [&](const auto& f) { return activation_tangent_backward(f, *previous); },
              [&](const auto& finish) { layer.tangent_backward(exec_, target, into, finish); });
        });
      } else if (i.op == Opcode::kActivation) {
        if (!net_.delta_dot(i.x)) continue;
        with_activation<Executor>(i, [&](const auto& f) {
          exec_.map(net_.size(i.y), activation_tangent_backward(f, i));
        });
      } else if (i.op == Opcode::kAdd) {
        add_backward(i, net_.delta_dot(i.y), net_.delta_dot(i.x), net_.delta_dot(i.x2));
      } else {
        with_norm(i, [&](const auto& layer) { layer.tangent_backward(exec_, target, into); });
        visit_linear_layer(i, [&](const auto& layer) {
          layer.backward(exec_, net_.delta_dot(i.y), net_.delta_dot(i.x));
        });
      }
    }
  }

  // Computes target = J' H_L J theta_dot, with J the derivative of the outputs in theta and H_L
  // the Hessian of the loss in the outputs; after forward() and tangent_forward().
  FASTMETA_HOST_DEVICE void gauss_newton_backward(Gradient target) const {
    tangent_of_loss();
    // The backward pass is linear in the gradient at the outputs: it takes H_L J theta_dot there.
    Network<storage_t> net = net_;
    net.arrays.delta = net_.arrays.delta_dot;
    Passes(exec_, net).backward(target, false);
  }

 private:
  FASTMETA_HOST_DEVICE const Instruction& instruction(int k) const {
    return net_.program.instructions[k];
  }

  static FASTMETA_HOST_DEVICE bool is_bilinear(const Instruction& i) {
    return i.op == Opcode::kLinear || i.op == Opcode::kConvolution;
  }
  // Calls fn(layer) with the layer of a bilinear instruction.
  template <typename Fn>
  FASTMETA_HOST_DEVICE void with_bilinear(const Instruction& i, const Fn& fn) const {
    if (i.op == Opcode::kLinear) fn(BilinearLayer<storage_t, LinearMaps>{net_, i});
    if constexpr (Executor::kHasImages) {
      if (i.op == Opcode::kConvolution) fn(BilinearLayer<storage_t, ConvolutionMaps>{net_, i});
    }
  }
  // Calls fn(band) if instructions k and k + 1 are fused; returns whether they are.
  template <typename Fn>
  FASTMETA_HOST_DEVICE bool with_fused_band([[maybe_unused]] int k,
                                            [[maybe_unused]] const Fn& fn) const {
    if constexpr (Executor::kHasFusedBands) {
      if (k < 0 || !instruction(k).is_fused) return false;
      fn(exec_.fused_band(net_, instruction(k), instruction(k + 1)));
      return true;
    }
    return false;
  }
  // Calls run(finish) with the activation fused into a layer, made(f), or with none.
  template <typename Made, typename Run>
  FASTMETA_HOST_DEVICE void with_finish(const Instruction* activation, const Made& made,
                                        const Run& run) const {
    if (activation == nullptr) return run(NoFinish{});
    with_activation<Executor>(*activation, [&](const auto& f) { run(made(f)); });
  }
  // Calls fn(layer) if the instruction normalises.
  template <typename Fn>
  FASTMETA_HOST_DEVICE void with_norm(const Instruction& i, const Fn& fn) const {
    if (i.op == Opcode::kLayerNorm) fn(LayerNorm<storage_t>{net_, i});
    if constexpr (Executor::kHasImages) {
      if (i.op == Opcode::kNorm) fn(NormLayer<storage_t>{net_, i});
    }
  }
  // Calls fn(layer) if it has no parameters and its pass for gradients also serves their tangents.
  template <typename Fn>
  FASTMETA_HOST_DEVICE void visit_linear_layer(const Instruction& i, const Fn& fn) const {
    if constexpr (Executor::kHasImages) {
      if (i.op == Opcode::kPool) fn(PoolLayer<storage_t>{net_, i});
      if (i.op == Opcode::kTranspose) fn(TransposeLayer<storage_t>{net_, i});
    }
  }

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

  // Adds the gradient of a sum to the gradients of both summands.
  FASTMETA_HOST_DEVICE void add_backward(const Instruction& i, Arena from, Arena to_x,
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
    if (spec.kind == LossKind::kNone) {
      // The gradient at the outputs was given: it is constant.
      exec_.map(net_.size(net_.program.output), Fill<storage_t>{0, l.dz_dot});
    } else if (spec.kind == LossKind::kCrossEntropy) {
      exec_.rows(net_.examples.count, CrossEntropyTangent<storage_t>{l});
    } else {
      with_regression_loss(spec, [&](const auto& loss) {
        using Loss = std::decay_t<decltype(loss)>;
        exec_.map(net_.size(net_.program.output), RegressionTangent<Loss, storage_t>{loss, l});
      });
    }
    weigh(l.dz_dot, {});
  }

  // Multiplies rows [B, outputs] and their losses by the examples' weights, if there are any.
  FASTMETA_HOST_DEVICE void weigh(Arena rows, Arena row_loss) const {
    const auto& examples = net_.examples;
    if (!examples.weight) return;
    const int64_t columns = net_.program.output_elements();
    exec_.rows(examples.count, WeightRows<storage_t>{columns, examples.weight, rows, row_loss});
  }

  Executor& exec_;
  const Network<storage_t>& net_;
};

}  // namespace fastmeta
