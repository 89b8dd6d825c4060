// Ops of ridge regression: tensors to a pass, and the pass to its device:
//
//   Device::forward(dtype, shape, operands, like)               on the device of the tensor `like`
//   Device::backward(dtype, shape, operands, gradients, like)
#pragma once

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "common/check.h"
#include "ridge_head/ridge_head.h"

namespace fastmeta {

template <typename Device>
struct RidgeHeadOps {
  using Tensor = at::Tensor;

  static std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& y,
                                                            const Tensor& weight, const Tensor& l2,
                                                            bool bias, bool dual) {
    const auto s = checked_shape(x, y, weight, l2, bias, dual);
    const auto options = x.options();
    const int64_t n = s.unknowns();
    auto head = at::empty({s.tasks, s.ways, s.features}, options);
    auto intercept = at::empty({s.tasks, bias ? s.ways : 0}, options);
    auto factor = at::empty({s.tasks, n, n}, options);
    auto coefficients = at::empty({s.tasks, s.ways, dual ? s.examples : 0}, options);
    if (s.tasks == 0) return {head, intercept, factor, coefficients};
    const auto rows = x.contiguous(), targets = y.contiguous(), weights = weight.contiguous(),
               ridge = l2.contiguous();
    const RidgeOperands operands{rows.const_data_ptr(),     targets.const_data_ptr(),
                                 weights.const_data_ptr(),  ridge.const_data_ptr(),
                                 head.mutable_data_ptr(),   intercept.mutable_data_ptr(),
                                 factor.mutable_data_ptr(), coefficients.mutable_data_ptr()};
    Device::forward(dtype_of(x), s, operands, x);
    return {head, intercept, factor, coefficients};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
      const Tensor& grad_head, const Tensor& grad_intercept, const Tensor& x, const Tensor& y,
      const Tensor& weight, const Tensor& l2, const Tensor& head, const Tensor& factor,
      const Tensor& coefficients, bool bias, bool dual) {
    const auto s = checked_shape(x, y, weight, l2, bias, dual);
    const int64_t n = s.unknowns();
    check_as(grad_head, {s.tasks, s.ways, s.features}, x, "grad_head");
    check_as(grad_intercept, {s.tasks, bias ? s.ways : 0}, x, "grad_intercept");
    check_as(head, {s.tasks, s.ways, s.features}, x, "head");
    check_as(factor, {s.tasks, n, n}, x, "factor");
    check_as(coefficients, {s.tasks, s.ways, dual ? s.examples : 0}, x, "coefficients");
    auto grad_x = at::empty(x.sizes(), x.options()), grad_y = at::empty(y.sizes(), x.options()),
         grad_weight = at::empty(weight.sizes(), x.options()),
         grad_l2 = at::empty(l2.sizes(), x.options());
    if (s.tasks == 0) return {grad_x, grad_y, grad_weight, grad_l2};
    const auto rows = x.contiguous(), targets = y.contiguous(), weights = weight.contiguous(),
               ridge = l2.contiguous(), solved = head.contiguous(), triangle = factor.contiguous(),
               duals = coefficients.contiguous(), upstream = grad_head.contiguous(),
               upstream_intercept = grad_intercept.contiguous();
    // A backward pass only reads what the forward pass left.
    const auto kept = [](const Tensor& left) { return const_cast<void*>(left.const_data_ptr()); };
    const RidgeOperands operands{rows.const_data_ptr(),
                                 targets.const_data_ptr(),
                                 weights.const_data_ptr(),
                                 ridge.const_data_ptr(),
                                 kept(solved),
                                 nullptr,
                                 kept(triangle),
                                 kept(duals)};
    const RidgeGradients gradients{
        upstream.const_data_ptr(), upstream_intercept.const_data_ptr(), grad_x.mutable_data_ptr(),
        grad_y.mutable_data_ptr(), grad_weight.mutable_data_ptr(),      grad_l2.mutable_data_ptr()};
    Device::backward(dtype_of(x), s, operands, gradients, x);
    return {grad_x, grad_y, grad_weight, grad_l2};
  }

 private:
  static RidgeShape checked_shape(const Tensor& x, const Tensor& y, const Tensor& weight,
                                  const Tensor& l2, bool bias, bool dual) {
    check_dims(x, 3, "x");
    check_dims(y, 3, "y");
    const auto dtype = dtype_of(x);
    TORCH_CHECK_TYPE(dtype == Dtype::kFloat || dtype == Dtype::kDouble,
                     "x: expected float32 or float64, got ", x.scalar_type());
    const RidgeShape s{x.size(0), x.size(1), y.size(2), x.size(2), bias, dual};
    check_as(y, {s.tasks, s.examples, s.ways}, x, "y");
    check_as(weight, {s.tasks, s.examples}, x, "weight");
    check_as(l2, {s.tasks}, x, "l2");
    TORCH_CHECK(s.examples > 0 && s.ways > 0 && s.features > 0,
                "x and y: expected examples, features and ways, got shapes ", x.sizes(), " and ",
                y.sizes());
    return s;
  }

  static void check_as(const Tensor& tensor, at::IntArrayRef shape, const Tensor& x,
                       const char* name) {
    check_same(tensor, x, name);
    check_shape(tensor, shape, name);
  }
};

template <typename Device>
void register_ridge_head(torch::Library& m) {
  using Ops = RidgeHeadOps<Device>;
  m.impl("ridge_head", &Ops::forward);
  m.impl("ridge_head_backward", &Ops::backward);
}

}  // namespace fastmeta
