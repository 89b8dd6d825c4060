// Ops of pair_scores: checked tensors to their device.
//
//   Device::sums(arrays, bias)             scores, or with a direction their tangent [T, Q, N]
//   Device::gradients(arrays, upstream)    gradients to x, y, weight and bias, or their tangents (of
//                                          bias: the gradient)
#pragma once

#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <string_view>
#include <tuple>
#include <utility>

#include "common/check.h"
#include "pair_scores/pair_scores.h"

namespace fastmeta {

inline PairActivation checked_pair_activation(std::string_view name) {
  const auto activation = pair_activation_named(name);
  TORCH_CHECK_VALUE(activation.has_value(), "activation: expected relu, tanh, silu or abs, got ",
                    name);
  return *activation;
}

inline PairScoresShape checked_pair_scores_shape(const at::Tensor& x, const at::Tensor& y,
                                                 const at::Tensor& weight) {
  check_dims(x, 3, "x");
  check_dims(y, 3, "y");
  check_same(x, y, "x and y");
  TORCH_CHECK(x.size(0) == y.size(0) && x.size(2) == y.size(2),
              "x and y: expected [T, Q, H] and [T, N, H] with the same T and H, got ", x.sizes(),
              " and ", y.sizes());
  check_wide(weight, x, "weight");
  check_shape(weight, {x.size(0), x.size(2)}, "weight");
  return {x.size(0), x.size(1), y.size(1), x.size(2)};
}

inline void check_pair_scores_bias(const at::Tensor& bias, const at::Tensor& x, const char* name) {
  check_wide(bias, x, name);
  check_shape(bias, {x.size(0)}, name);
}

inline void check_pair_scores_grad(const at::Tensor& grad_scores, const at::Tensor& x,
                                   const PairScoresShape& shape) {
  check_shape(grad_scores, {shape.tasks, shape.queries, shape.classes}, "grad_scores");
  check_same(grad_scores, x, "grad_scores and x");
}

inline void check_pair_scores_direction(const at::Tensor& x_dot, const at::Tensor& y_dot,
                                        const at::Tensor& weight_dot, const at::Tensor& x,
                                        const at::Tensor& y) {
  check_same(x_dot, x, "x_dot and x");
  check_shape(x_dot, x.sizes(), "x_dot");
  check_same(y_dot, x, "y_dot and x");
  check_shape(y_dot, y.sizes(), "y_dot");
  check_wide(weight_dot, x, "weight_dot");
  check_shape(weight_dot, {x.size(0), x.size(2)}, "weight_dot");
}

// Contiguous tensors of a call; without a direction its three are undefined.
struct PairScoresArrays {
  PairActivation activation;
  PairScoresShape shape;
  at::Tensor x, y, weight, x_dot, y_dot, weight_dot;

  PairScoresArrays(const at::Tensor& x, const at::Tensor& y, const at::Tensor& weight,
                   std::string_view activation)
      : activation(checked_pair_activation(activation)),
        shape(checked_pair_scores_shape(x, y, weight)),
        x(x.contiguous()),
        y(y.contiguous()),
        weight(weight.contiguous()) {}

  PairScoresArrays along(const at::Tensor& x_dot, const at::Tensor& y_dot,
                         const at::Tensor& weight_dot) && {
    check_pair_scores_direction(x_dot, y_dot, weight_dot, x, y);
    this->x_dot = x_dot.contiguous();
    this->y_dot = y_dot.contiguous();
    this->weight_dot = weight_dot.contiguous();
    return std::move(*this);
  }

  // Valid as long as this is.
  PairScoresOperands operands() const {
    const auto data = [](const at::Tensor& a) {
      return a.defined() ? a.const_data_ptr() : nullptr;
    };
    return {dtype_of(x),  activation,  shape,       data(x),         data(y),
            data(weight), data(x_dot), data(y_dot), data(weight_dot)};
  }
};

struct PairScoresGradients {
  at::Tensor x, y, weight, bias;

  static PairScoresGradients zeros(const PairScoresArrays& arrays) {
    const auto& s = arrays.shape;
    const auto options = arrays.x.options(), wide = wide_options(arrays.x);
    return {at::zeros({s.tasks, s.queries, s.features}, options),
            at::zeros({s.tasks, s.classes, s.features}, options),
            at::zeros({s.tasks, s.features}, wide), at::zeros({s.tasks}, wide)};
  }
};

template <typename Device>
struct PairScoresOps {
  using Tensor = at::Tensor;

  static Tensor forward(const Tensor& x, const Tensor& y, const Tensor& weight, const Tensor& bias,
                        std::string_view activation) {
    const PairScoresArrays arrays(x, y, weight, activation);
    check_pair_scores_bias(bias, x, "bias");
    return Device::sums(arrays, bias.contiguous());
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_scores,
                                                             const Tensor& x, const Tensor& y,
                                                             const Tensor& weight,
                                                             std::string_view activation) {
    const PairScoresArrays arrays(x, y, weight, activation);
    check_pair_scores_grad(grad_scores, x, arrays.shape);
    const auto grads = Device::gradients(arrays, grad_scores.contiguous());
    return {grads.x, grads.y, grads.weight, grads.bias};
  }

  static Tensor tangent(const Tensor& x_dot, const Tensor& y_dot, const Tensor& weight_dot,
                        const Tensor& bias_dot, const Tensor& x, const Tensor& y,
                        const Tensor& weight, std::string_view activation) {
    const auto arrays = PairScoresArrays(x, y, weight, activation).along(x_dot, y_dot, weight_dot);
    check_pair_scores_bias(bias_dot, x, "bias_dot");
    return Device::sums(arrays, bias_dot.contiguous());
  }

  static std::tuple<Tensor, Tensor, Tensor> bend(const Tensor& grad_scores, const Tensor& x_dot,
                                                 const Tensor& y_dot, const Tensor& weight_dot,
                                                 const Tensor& x, const Tensor& y,
                                                 const Tensor& weight,
                                                 std::string_view activation) {
    const auto arrays = PairScoresArrays(x, y, weight, activation).along(x_dot, y_dot, weight_dot);
    check_pair_scores_grad(grad_scores, x, arrays.shape);
    const auto grads = Device::gradients(arrays, grad_scores.contiguous());
    return {grads.x, grads.y, grads.weight};
  }
};

template <typename Device>
void register_pair_scores(torch::Library& m) {
  using Ops = PairScoresOps<Device>;
  m.impl("pair_scores", &Ops::forward);
  m.impl("pair_scores_backward", &Ops::backward);
  m.impl("pair_scores_tangent", &Ops::tangent);
  m.impl("pair_scores_bend", &Ops::bend);
}

}  // namespace fastmeta
