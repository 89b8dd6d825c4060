// Ops of activations: tensors to one of the three passes, and the pass to its device:
//
//   Device::run(f, count, pass, like)   runs it on the device of the tensor `like`, with at least
//                                       one number
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "activation/activation.h"
#include "common/check.h"

namespace fastmeta {

template <typename Device>
struct ActivationOps {
  using Tensor = at::Tensor;

  static Tensor forward(const Tensor& x, int64_t kind, double a, double b) {
    const auto f = checked(kind, a, b);
    const auto from = x.contiguous();
    auto y = at::empty(x.sizes(), from.options());
    with_numbers(x, [&](auto number) {
      using value_t = decltype(number);
      run(f, ActivationValue<value_t>{data<value_t>(from), target<value_t>(y)}, y);
    });
    return y;
  }

  static Tensor backward(const Tensor& g, const Tensor& x, int64_t kind, double a, double b) {
    const auto f = checked(kind, a, b);
    check_like(g, x, "grad");
    const auto upstream = g.contiguous(), from = x.contiguous();
    auto grad_x = at::empty(x.sizes(), from.options());
    with_numbers(x, [&](auto number) {
      using value_t = decltype(number);
      const ActivationGradient<value_t> pass{data<value_t>(upstream), data<value_t>(from),
                                             target<value_t>(grad_x)};
      run(f, pass, grad_x);
    });
    return grad_x;
  }

  static std::tuple<Tensor, Tensor> second(const Tensor& v, const Tensor& g, const Tensor& x,
                                           int64_t kind, double a, double b) {
    const auto f = checked(kind, a, b);
    check_like(v, x, "grad_grad_x");
    check_like(g, x, "grad");
    const auto along = v.contiguous(), upstream = g.contiguous(), from = x.contiguous();
    auto grad_g = at::empty(x.sizes(), from.options());
    auto grad_x = at::empty(x.sizes(), from.options());
    with_numbers(x, [&](auto number) {
      using value_t = decltype(number);
      const ActivationSecond<value_t> pass{data<value_t>(along), data<value_t>(upstream),
                                           data<value_t>(from), target<value_t>(grad_g),
                                           target<value_t>(grad_x)};
      run(f, pass, grad_x);
    });
    return {grad_g, grad_x};
  }

 private:
  static Activation checked(int64_t kind, double a, double b) {
    TORCH_CHECK_VALUE(is_activation(kind), "kind: expected the number of an activation, got ",
                      kind);
    return {static_cast<ActivationKind>(kind), a, b};
  }
  static void check_like(const Tensor& other, const Tensor& x, const char* name) {
    check_same(other, x, name);
    check_shape(other, x.sizes(), name);
  }
  // Calls fn with a number of x's dtype.
  template <typename Fn>
  static void with_numbers(const Tensor& x, const Fn& fn) {
    AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "activation", [&] { fn(scalar_t(0)); });
  }
  template <typename value_t>
  static const value_t* data(const Tensor& x) {
    return x.const_data_ptr<value_t>();
  }
  template <typename value_t>
  static value_t* target(Tensor& x) {
    return x.mutable_data_ptr<value_t>();
  }
  template <typename Pass>
  static void run(const Activation& f, const Pass& pass, const Tensor& like) {
    if (like.numel() > 0) Device::run(f, like.numel(), pass, like);
  }
};

template <typename Device>
void register_activation(torch::Library& m) {
  using Ops = ActivationOps<Device>;
  m.impl("activation", &Ops::forward);
  m.impl("activation_backward", &Ops::backward);
  m.impl("activation_backward_backward", &Ops::second);
}

}  // namespace fastmeta
