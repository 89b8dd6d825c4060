// Ops of batch norm: tensors to one of the three passes, and the pass to its device:
//
//   Device::run(dtype, shape, eps, pass, like)   runs it on the device of the tensor `like`, whose
//                                                channels have numbers
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>

#include "batch_norm/batch_norm.h"
#include "common/check.h"

namespace fastmeta {

template <typename Device>
struct BatchNormOps {
  using Tensor = at::Tensor;

  static Tensor forward(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps) {
    const auto shape = checked_shape(x);
    check_rows(weight, x, "weight");
    check_rows(bias, x, "bias");
    const auto images = x.contiguous(), scale = weight.contiguous(), shift = bias.contiguous();
    auto y = at::empty(x.sizes(), images.options());
    if (y.numel() == 0) return y;
    const BatchNormForward pass{data(images), data(scale), data(shift), y.mutable_data_ptr()};
    Device::run(dtype_of(x), shape, eps, pass, x);
    return y;
  }

  static std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& g, const Tensor& x,
                                                     const Tensor& weight, double eps) {
    const auto shape = checked_shape(x);
    check_images(g, x, "grad");
    check_rows(weight, x, "weight");
    auto grad_x = at::empty(x.sizes(), x.options());
    if (x.numel() == 0) return {grad_x, zeros_as(weight), zeros_as(weight)};
    auto grad_weight = at::empty(weight.sizes(), x.options()),
         grad_bias = at::empty(weight.sizes(), x.options());
    const auto upstream = g.contiguous(), images = x.contiguous(), scale = weight.contiguous();
    const BatchNormBackward pass{data(upstream),
                                 data(images),
                                 data(scale),
                                 grad_x.mutable_data_ptr(),
                                 grad_weight.mutable_data_ptr(),
                                 grad_bias.mutable_data_ptr()};
    Device::run(dtype_of(x), shape, eps, pass, x);
    return {grad_x, grad_weight, grad_bias};
  }

  static std::tuple<Tensor, Tensor, Tensor> second(const Tensor& v, const Tensor& w,
                                                   const Tensor& b, const Tensor& g,
                                                   const Tensor& x, const Tensor& weight,
                                                   double eps) {
    const auto shape = checked_shape(x);
    check_images(v, x, "grad_grad_x");
    check_images(g, x, "grad");
    check_rows(w, x, "grad_grad_weight");
    check_rows(b, x, "grad_grad_bias");
    check_rows(weight, x, "weight");
    auto grad_g = at::empty(x.sizes(), x.options()), grad_x = at::empty(x.sizes(), x.options());
    if (x.numel() == 0) return {grad_g, grad_x, zeros_as(weight)};
    auto grad_weight = at::empty(weight.sizes(), x.options());
    const auto images = x.contiguous(), upstream = g.contiguous(), along = v.contiguous();
    const auto scale = weight.contiguous(), along_scale = w.contiguous(),
               along_shift = b.contiguous();
    const BatchNormSecond pass{data(along),
                               data(along_scale),
                               data(along_shift),
                               data(upstream),
                               data(images),
                               data(scale),
                               grad_g.mutable_data_ptr(),
                               grad_x.mutable_data_ptr(),
                               grad_weight.mutable_data_ptr()};
    Device::run(dtype_of(x), shape, eps, pass, x);
    return {grad_g, grad_x, grad_weight};
  }

 private:
  // Zeros, the result for channels without numbers.
  static Tensor zeros_as(const Tensor& rows) { return at::zeros(rows.sizes(), rows.options()); }
  static const void* data(const Tensor& x) { return x.const_data_ptr(); }

  static BatchNormShape checked_shape(const Tensor& x) {
    check_dims(x, 4, "x");
    const auto dtype = dtype_of(x);
    TORCH_CHECK_TYPE(dtype == Dtype::kFloat || dtype == Dtype::kDouble,
                     "x: expected float32 or float64, got ", x.scalar_type());
    return {x.size(0), x.size(1), x.size(2), x.size(3)};
  }
  static void check_images(const Tensor& images, const Tensor& x, const char* name) {
    check_same(images, x, name);
    check_shape(images, x.sizes(), name);
  }
  static void check_rows(const Tensor& rows, const Tensor& x, const char* name) {
    check_same(rows, x, name);
    check_shape(rows, {x.size(0), x.size(2)}, name);
  }
};

template <typename Device>
void register_batch_norm(torch::Library& m) {
  using Ops = BatchNormOps<Device>;
  m.impl("task_batch_norm", &Ops::forward);
  m.impl("task_batch_norm_backward", &Ops::backward);
  m.impl("task_batch_norm_backward_backward", &Ops::second);
}

}  // namespace fastmeta
