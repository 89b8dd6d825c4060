// Layers that are linear in their input and in their weight, and their four passes. With the three
// maps z = f(x, w), dx = f_x(dz, w) and dw = f_w(dz, x):
//
//   forward           z = f(x, w) + b
//   backward          dx = f_x(dz, w)               dw = f_w(dz, x)          db = sum over rows of dz
//   tangent forward   z_dot = f(x_dot, w) + f(x, w_dot) + b_dot
//   tangent backward  dx_dot = f_x(dz_dot, w) + f_x(dz, w_dot)
//                     dw_dot = f_w(dz_dot, x) + f_w(dz, x_dot)               db_dot = sum of dz_dot
//
//   linear, on the last dimension, weight [O, I]:   z = x W', dx = dz W, dW = dz' x
//   convolution of channels-last images:            execution/conv_shape.h
//
// `finish` runs on each element that the pass hands to the next layer, `update` on each element of
// a parameter's gradient.
#pragma once

#include <type_traits>

#include "execution/elementwise.h"
#include "task_program/program/network.h"

namespace fastmeta {

template <typename storage_t>
FASTMETA_HOST_DEVICE Product<storage_t> linear_map(const Network<storage_t>& net,
                                                   const Instruction& i, MapTo to,
                                                   Array<storage_t> c) {
  const int64_t rows = net.size(i.y) / i.outputs;
  switch (to) {
    case MapTo::kOutput:
      return {Form::kNT, rows, i.outputs, i.inputs, c};
    case MapTo::kInput:
      return {Form::kNN, rows, i.inputs, i.outputs, c};
    case MapTo::kWeight:
      return {Form::kTN, i.outputs, i.inputs, rows, c};
  }
  return {};
}

// Maps of a linear layer.
struct LinearMaps {
  template <typename storage_t>
  FASTMETA_HOST_DEVICE static auto to(const Network<storage_t>& net, const Instruction& i, MapTo to,
                                      Array<storage_t> c) {
    return linear_map(net, i, to, c);
  }
  template <typename Executor, typename Sum, typename Finish>
  FASTMETA_HOST_DEVICE static void run(Executor& exec, const Sum& sum, const Finish& finish) {
    exec.product(sum, finish);
  }
};
struct ConvolutionMaps {
  template <typename storage_t>
  FASTMETA_HOST_DEVICE static auto to(const Network<storage_t>& net, const Instruction& i, MapTo to,
                                      Array<storage_t> c) {
    return Convolution<storage_t>{i.conv, to, net.examples.count, c};
  }
  template <typename Executor, typename Sum, typename Finish>
  FASTMETA_HOST_DEVICE static void run(Executor& exec, const Sum& sum, const Finish& finish) {
    exec.convolution(sum, finish);
  }
};

template <typename storage_t, typename Maps>
struct BilinearLayer {
  const Network<storage_t>& net;
  const Instruction& i;

  template <typename Executor, typename Finish>
  FASTMETA_HOST_DEVICE void forward(Executor& exec, const Finish& finish) const {
    auto z = Maps::to(net, i, MapTo::kOutput, net.value(i.y));
    if constexpr (std::is_same_v<Maps, ConvolutionMaps>) {
      if (i.normed >= 0) z.moments = net.extra(i.normed);
    }
    z.bias = net.parameter(i.bias);
    z.add(net.value(i.x), net.parameter(i.weight));
    Maps::run(exec, z, finish);
  }

  template <typename Executor, typename Finish>
  FASTMETA_HOST_DEVICE void tangent_forward(Executor& exec, const Finish& finish) const {
    auto z_dot = Maps::to(net, i, MapTo::kOutput, net.value_dot(i.y));
    z_dot.bias = net.tangent_of(i.bias);
    add_where_there(z_dot, net.value_dot(i.x), net.parameter(i.weight));
    add_where_there(z_dot, net.value(i.x), net.tangent_of(i.weight));
    Maps::run(exec, z_dot, finish);
  }

  // Computes grads, if wanted; adds if told to, or if another layer shares the parameter. An update
  // may change the weights, so that their gradient comes last.
  template <typename Executor, typename Finish, typename Update>
  FASTMETA_HOST_DEVICE void backward(Executor& exec, ParameterGradient<storage_t> grads, bool adds,
                                     const Finish& finish, const Update& update) const {
    if (net.delta(i.x)) {
      auto dx = Maps::to(net, i, MapTo::kInput, net.delta(i.x));
      dx.into.adds = i.adds_to_x;
      dx.add(net.delta(i.y), net.parameter(i.weight));
      Maps::run(exec, dx, finish);
    }
    if (const auto target = grads.at(i.weight)) {
      auto dw = Maps::to(net, i, MapTo::kWeight, target);
      dw.into.adds = adds || i.adds_to_weight;
      dw.add(net.delta(i.y), net.value(i.x));
      Maps::run(exec, dw, update.from(i.weight));
    }
    if (const auto target = grads.at(i.bias)) {
      auto finish_bias = update.from(i.bias);
      exec.map(
          i.outputs,
          ColumnSums<storage_t, decltype(finish_bias)>{
              rows(), i.outputs, net.delta(i.y), target, {adds || i.adds_to_bias}, finish_bias});
    }
  }

  // Computes target = H theta_dot of this layer's parameters. target may be theta_dot itself, so it
  // is changed last.
  template <typename Executor, typename Finish>
  FASTMETA_HOST_DEVICE void tangent_backward(Executor& exec, ParameterGradient<storage_t> target,
                                             const StoreMode<storage_t>& into,
                                             const Finish& finish) const {
    if (net.delta_dot(i.x)) {
      auto dx_dot = Maps::to(net, i, MapTo::kInput, net.delta_dot(i.x));
      dx_dot.into.adds = i.adds_to_x;
      dx_dot.add(net.delta_dot(i.y), net.parameter(i.weight));
      add_where_there(dx_dot, net.delta(i.y), net.tangent_of(i.weight));
      Maps::run(exec, dx_dot, finish);
    }
    if (const auto weight = target.at(i.weight)) {
      auto dw_dot = Maps::to(net, i, MapTo::kWeight, weight);
      dw_dot.into = into.or_adds(i.adds_to_weight);
      dw_dot.add(net.delta_dot(i.y), net.value(i.x));
      add_where_there(dw_dot, net.delta(i.y), net.value_dot(i.x));
      Maps::run(exec, dw_dot, NoFinish{});
    }
    if (const auto bias = target.at(i.bias)) {
      exec.map(i.outputs, ColumnSums<storage_t>{rows(), i.outputs, net.delta_dot(i.y), bias,
                                                into.or_adds(i.adds_to_bias)});
    }
  }

 private:
  FASTMETA_HOST_DEVICE int64_t rows() const { return net.size(i.y) / i.outputs; }

  template <typename Sum>
  FASTMETA_HOST_DEVICE static void add_where_there(Sum& sum, Array<storage_t> a,
                                                   Array<storage_t> b) {
    if (a && b) sum.add(a, b);
  }
};

}  // namespace fastmeta
