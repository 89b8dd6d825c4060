// Argument checks of linear_head on every device, except the range of labels.
#pragma once

#include <ATen/ops/empty.h>

#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "linear_head/linear_head.h"

namespace fastmeta {

inline HeadLoss checked_head_loss(std::string_view loss) {
  if (loss == "cross_entropy") return HeadLoss::kCrossEntropy;
  if (loss == "mse") return HeadLoss::kMse;
  TORCH_CHECK_VALUE(loss == "logistic", "loss: expected cross_entropy, mse or logistic, got ",
                    loss);
  return HeadLoss::kLogistic;
}

// Upper bound of labels [T, S] of cross entropy and logistic loss.
inline int64_t label_classes(HeadLoss loss, const LinearHeadShape& shape) {
  return loss == HeadLoss::kLogistic ? 2 : shape.ways;
}

inline LinearHeadShape checked_head_shape(const at::Tensor& x, const at::Tensor& targets,
                                          const at::Tensor& weight,
                                          const std::optional<at::Tensor>& bias,
                                          const at::Tensor& lr, HeadLoss loss) {
  check_dims(x, 3, "x");
  check_dims(weight, 3, "weight");
  check_dims(lr, 2, "lr");
  const LinearHeadShape s{x.size(0), x.size(1), weight.size(1), x.size(2), lr.size(1)};
  check_same(x, weight, "x and weight");
  check_shape(weight, {s.tasks, s.ways, s.features}, "weight");
  if (bias) {
    check_same(x, *bias, "x and bias");
    check_shape(*bias, {s.tasks, s.ways}, "bias");
  }
  if (loss == HeadLoss::kMse) {
    check_same(x, targets, "x and targets");
    check_shape(targets, {s.tasks, s.support, s.ways}, "targets");
  } else {
    check_labels(targets, x, "targets");
    check_shape(targets, {s.tasks, s.support}, "targets");
  }
  check_wide(lr, x, "lr");
  TORCH_CHECK(lr.size(0) == s.tasks, "lr: expected ", s.tasks, " tasks, got ", lr.size(0));
  TORCH_CHECK(s.support > 0 && s.ways > 0, "x and weight: expected examples and ways, got shapes ",
              x.sizes(), " and ", weight.sizes());
  TORCH_CHECK(loss != HeadLoss::kLogistic || s.ways == 1,
              "weight: expected one way for the logistic loss, got ", s.ways);
  return s;
}

// Shape of the predictions that the forward pass keeps for the backward pass.
inline std::vector<int64_t> predictions_shape(const LinearHeadShape& s) {
  return {s.tasks, s.steps, s.ways, s.support};
}

inline std::vector<int64_t> products_shape(const LinearHeadShape& s, bool dual) {
  if (dual) return {s.tasks, s.support, s.support};
  return {s.tasks, s.steps, s.ways, s.features};
}

inline void check_head_kept(const at::Tensor& predictions, const at::Tensor& products,
                            const at::Tensor& x, const LinearHeadShape& s, bool dual) {
  check_wide(predictions, x, "predictions");
  check_wide(products, x, "products");
  check_shape(predictions, predictions_shape(s), "predictions");
  check_shape(products, products_shape(s, dual), "products");
}

inline void check_head_upstream(const at::Tensor& grad_weight, const at::Tensor& grad_bias,
                                const at::Tensor& x, const LinearHeadShape& s, bool has_bias) {
  check_same(x, grad_weight, "x and grad_weight");
  check_same(x, grad_bias, "x and grad_bias");
  check_shape(grad_weight, {s.tasks, s.ways, s.features}, "grad_weight");
  check_shape(grad_bias, {s.tasks, has_bias ? s.ways : 0}, "grad_bias");
}

using HeadGradientTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Gradients of x, targets, weight, bias and lr; an absent one is empty.
inline HeadGradientTensors empty_head_gradients(const at::Tensor& x, const LinearHeadShape& s,
                                                const LinearHeadOptions& options, bool has_x) {
  const auto of_x = x.options();
  return {at::empty({s.tasks, s.support, has_x ? s.features : 0}, of_x),
          at::empty({s.tasks, s.support, options.loss == HeadLoss::kMse ? s.ways : 0}, of_x),
          at::empty({s.tasks, s.ways, s.features}, of_x),
          at::empty({s.tasks, options.has_bias ? s.ways : 0}, of_x),
          at::empty({s.tasks, s.steps}, wide_options(x))};
}

}  // namespace fastmeta
