// Ops of convolution: tensors to a call of one of the three maps, and the call to its device:
//
//   Device::channels_last(x)  its images [T, B, C, H, W] as [T, B, H, W, C]
//   Device::channels_first(x) the inverse, to contiguous images
//   Device::run(call, like)   runs the call on the device of the tensor `like`; each size is at least 1
//   Device::check_size(shape) raises for a convolution whose sizes its kernels cannot count
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <array>
#include <optional>

#include "common/check.h"
#include "common/dtype.h"
#include "execution/conv_shape.h"

namespace fastmeta {

// One of the three arrays; tasks are `stride` elements apart, 0 if they share it.
struct TaskArray {
  void* data = nullptr;
  int64_t stride = 0;
};

struct TaskConvCall {
  MapTo to;
  Dtype dtype;
  ConvShape shape;
  int64_t tasks, examples;
  TaskArray outputs, inputs, weights;  // [B, H', W', O], [B, H, W, C], [O, C / groups, kh, kw]
  TaskArray bias;                      // [O], or none
};

// Makes each task contiguous; tasks may share one part by stride 0.
inline at::Tensor contiguous_tasks(const at::Tensor& x) {
  return x.size(0) > 0 && x.select(0, 0).is_contiguous() ? x : x.contiguous();
}

inline TaskArray task_array(const at::Tensor& x) {
  return {const_cast<void*>(x.const_data_ptr()), x.size(0) > 0 ? x.stride(0) : 0};
}

// Permutes [T, B, C, H, W] <-> [T, B, H, W, C].
inline at::Tensor channels_last(const at::Tensor& x) {
  return contiguous_tasks(x.permute({0, 1, 3, 4, 2}));
}

// Whether images [T, B, C, H, W] are channels-last in memory; the results then are too.
inline bool is_channels_last(const at::Tensor& x) {
  return !x.is_contiguous() && x.size(2) > 1 && x.stride(2) == 1 && x.stride(4) == x.size(2);
}

inline ConvShape checked_conv_shape(at::IntArrayRef size, at::IntArrayRef weight,
                                    at::IntArrayRef stride, at::IntArrayRef padding,
                                    at::IntArrayRef dilation, int64_t groups) {
  for (int i = 0; i < 2; ++i) {
    TORCH_CHECK(stride[i] >= 1 && padding[i] >= 0 && dilation[i] >= 1,
                "stride, dilation and padding: expected at least 1, 1 and 0, got ", stride, ", ",
                dilation, " and ", padding);
  }
  TORCH_CHECK(groups == 1 || (groups == size[0] && weight[0] % groups == 0),
              "groups: expected 1, or the channels and a divisor of the outputs, got ", groups,
              " for ", size[0], " channels and ", weight[0], " outputs");
  TORCH_CHECK(weight[1] * groups == size[0], "weight: expected ", size[0] / groups,
              " channels, got ", weight[1]);
  const ConvShape shape{size[0],     weight[0],   size[1],   size[2],    weight[2],
                        weight[3],   stride[0],   stride[1], padding[0], padding[1],
                        dilation[0], dilation[1], groups};
  const int64_t reach_h = dilation[0] * (weight[2] - 1), reach_w = dilation[1] * (weight[3] - 1);
  TORCH_CHECK(shape.weight_size() > 0 && shape.in_positions() > 0 && weight[2] > 0 &&
                  size[1] + 2 * padding[0] > reach_h && size[2] + 2 * padding[1] > reach_w,
              "image: expected it neither empty nor smaller than the kernel ", weight, ", got ",
              size);
  return shape;
}

template <typename Device>
struct TaskConvOps {
  using Tensor = at::Tensor;
  using Pair = at::IntArrayRef;

  static Tensor output(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                       Pair stride, Pair padding, Pair dilation, int64_t groups) {
    check_pair(x, "x", weight, "weight");
    const auto shape = checked_shape(x.sizes().slice(2), weight.sizes().slice(1), stride, padding,
                                     dilation, groups);
    const auto images = Device::channels_last(x), weights = contiguous_tasks(weight);
    auto out = at::empty(output_size(x, shape), x.options());
    TaskConvCall call = call_of(MapTo::kOutput, shape, out, images, weights);
    Tensor biases;
    if (bias) {
      check_same(x, *bias, "x and bias");
      check_shape(*bias, {call.tasks, shape.outputs}, "bias");
      biases = contiguous_tasks(*bias);
      call.bias = task_array(biases);
    }
    run(call, x);
    return as(x, out);
  }

  static Tensor input(const Tensor& grad, const Tensor& weight, Pair size, Pair stride,
                      Pair padding, Pair dilation, int64_t groups) {
    check_pair(grad, "grad", weight, "weight");
    const std::array image{weight.size(2) * groups, size[0], size[1]};
    const auto shape =
        checked_shape(image, weight.sizes().slice(1), stride, padding, dilation, groups);
    const auto images = Device::channels_last(grad), weights = contiguous_tasks(weight);
    check_shape(images, output_size(grad, shape), "grad, channels last,");
    auto out = at::empty({grad.size(0), grad.size(1), shape.height, shape.width, shape.channels},
                         grad.options());
    run(call_of(MapTo::kInput, shape, images, out, weights), grad);
    return as(grad, out);
  }

  static Tensor weight(const Tensor& grad, const Tensor& x, Pair kernel, Pair stride, Pair padding,
                       Pair dilation, int64_t groups) {
    check_pair(grad, "grad", x, "x");
    TORCH_CHECK(groups >= 1, "groups: expected at least 1, got ", groups);
    const std::array weights{grad.size(2), x.size(2) / groups, kernel[0], kernel[1]};
    const auto shape =
        checked_shape(x.sizes().slice(2), weights, stride, padding, dilation, groups);
    const auto grads = Device::channels_last(grad), images = Device::channels_last(x);
    check_shape(grads, output_size(x, shape), "grad, channels last,");
    const std::array size{x.size(0), weights[0], weights[1], weights[2], weights[3]};
    if (x.size(1) == 0) return at::zeros(size, x.options());
    auto out = at::empty(size, x.options());
    run(call_of(MapTo::kWeight, shape, grads, images, out), x);
    return out;
  }

 private:
  // Views images [T, B, H, W, C] as [T, B, C, H, W], in memory like `like`.
  static Tensor as(const Tensor& like, const Tensor& images) {
    return is_channels_last(like) ? images.permute({0, 1, 4, 2, 3})
                                  : Device::channels_first(images);
  }

  static ConvShape checked_shape(Pair size, Pair weight, Pair stride, Pair padding, Pair dilation,
                                 int64_t groups) {
    const auto shape = checked_conv_shape(size, weight, stride, padding, dilation, groups);
    Device::check_size(shape);
    return shape;
  }

  static void check_pair(const Tensor& a, const char* a_name, const Tensor& b, const char* b_name) {
    check_dims(a, 5, a_name);
    check_dims(b, 5, b_name);
    TORCH_CHECK(
        a.scalar_type() == b.scalar_type() && a.device() == b.device() && a.size(0) == b.size(0),
        a_name, " and ", b_name, ": expected the same tasks, dtype and device, got ", a.sizes(),
        " ", a.scalar_type(), " on ", a.device(), " and ", b.sizes(), " ", b.scalar_type(), " on ",
        b.device());
    dtype_of(a);  // raises for a type that is none of the four
  }

  static std::array<int64_t, 5> output_size(const Tensor& images, const ConvShape& shape) {
    return {images.size(0), images.size(1), shape.out_height(), shape.out_width(), shape.outputs};
  }

  // Makes a call from tensors that the caller keeps alive.
  static TaskConvCall call_of(MapTo to, const ConvShape& shape, const Tensor& outputs,
                              const Tensor& inputs, const Tensor& weights) {
    return {to,
            dtype_of(inputs),
            shape,
            inputs.size(0),
            inputs.size(1),
            task_array(outputs),
            task_array(inputs),
            task_array(weights),
            {}};
  }

  static void run(const TaskConvCall& call, const Tensor& like) {
    if (call.tasks > 0 && call.examples > 0) Device::run(call, like);
  }
};

template <typename Device>
void register_task_conv(torch::Library& m) {
  using Ops = TaskConvOps<Device>;
  m.impl("task_conv2d", &Ops::output);
  m.impl("task_conv2d_input", &Ops::input);
  m.impl("task_conv2d_weight", &Ops::weight);
}

}  // namespace fastmeta
