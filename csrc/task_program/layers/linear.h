// Linear layer on the last dimension, weight [O, I], and its four passes:
//
//   forward           z = x W' + b
//   backward          dx = dz W              dW = dz' x                 db = sum over rows of dz
//   tangent forward   z_dot = x_dot W' + x W_dot' + b_dot
//   tangent backward  dx_dot = dz_dot W + dz W_dot
//                     dW_dot = dz_dot' x + dz' x_dot                    db_dot = sum of dz_dot
//
// `finish` is done with each element that the pass to the next layer makes, `update` with each of
// the gradient of a parameter.
#pragma once

#include "task_program/elementwise.h"
#include "task_program/network.h"

namespace fastmeta {

template <typename storage_t>
struct Linear {
  const Network<storage_t>& net;
  const Instruction& i;

  FASTMETA_HOST_DEVICE int64_t rows() const { return net.size(i.y) / i.outputs; }

  template <typename Executor, typename Finish>
  FASTMETA_HOST_DEVICE void forward(Executor& exec, const Finish& finish) const {
    auto p = product(Form::kNT, rows(), i.outputs, i.inputs, net.value(i.y));
    p.bias = net.parameters.at(i.bias);
    p.add(net.value(i.x), net.parameters.at(i.weight));
    exec.product(p, finish);
  }

  template <typename Executor, typename Finish>
  FASTMETA_HOST_DEVICE void tangent_forward(Executor& exec, const Finish& finish) const {
    auto p = product(Form::kNT, rows(), i.outputs, i.inputs, net.value_dot(i.y));
    p.bias = net.tangent_of(i.bias);
    add_where_there(p, net.value_dot(i.x), net.parameters.at(i.weight));
    add_where_there(p, net.value(i.x), net.tangent_of(i.weight));
    exec.product(p, finish);
  }

  // grads [P] (+)=, where wanted; adds where told to, or where another layer has the parameter. An
  // update may change the weights, so that their gradient comes last.
  template <typename Executor, typename Finish, typename Update>
  FASTMETA_HOST_DEVICE void backward(Executor& exec, Array<storage_t> grads, bool adds,
                                     const Finish& finish, const Update& update) const {
    if (const auto dx = net.delta(i.x)) {
      auto p = product(Form::kNN, rows(), i.inputs, i.outputs, dx);
      p.into.adds = i.adds_to_x;
      p.add(net.delta(i.y), net.parameters.at(i.weight));
      exec.product(p, finish);
    }
    if (!grads) return;
    if (is_adapted(i.weight)) {
      auto p = product(Form::kTN, i.outputs, i.inputs, rows(), grads.from(i.weight));
      p.into.adds = adds || i.adds_to_weight;
      p.add(net.delta(i.y), net.value(i.x));
      exec.product(p, update.from(i.weight));
    }
    if (is_adapted(i.bias)) {
      auto finish_bias = update.from(i.bias);
      exec.map(i.outputs, ColumnSums<storage_t, decltype(finish_bias)>{rows(),
                                                                       i.outputs,
                                                                       net.delta(i.y),
                                                                       grads.from(i.bias),
                                                                       {adds || i.adds_to_bias},
                                                                       finish_bias});
    }
  }

  // target [P] = H theta_dot of this layer's parameters; it may be theta_dot itself, and is changed last.
  template <typename Executor, typename Finish>
  FASTMETA_HOST_DEVICE void tangent_backward(Executor& exec, Array<storage_t> target,
                                             const Accumulation<storage_t>& into,
                                             const Finish& finish) const {
    if (const auto dx_dot = net.delta_dot(i.x)) {
      auto p = product(Form::kNN, rows(), i.inputs, i.outputs, dx_dot);
      p.into.adds = i.adds_to_x;
      p.add(net.delta_dot(i.y), net.parameters.at(i.weight));
      add_where_there(p, net.delta(i.y), net.tangent_of(i.weight));
      exec.product(p, finish);
    }
    if (is_adapted(i.weight)) {
      auto p = product(Form::kTN, i.outputs, i.inputs, rows(), target.from(i.weight));
      p.into = into.or_adds(i.adds_to_weight);
      p.add(net.delta_dot(i.y), net.value(i.x));
      add_where_there(p, net.delta(i.y), net.value_dot(i.x));
      exec.product(p, NoFinish{});
    }
    if (is_adapted(i.bias)) {
      exec.map(i.outputs, ColumnSums<storage_t>{rows(), i.outputs, net.delta_dot(i.y),
                                                target.from(i.bias), into.or_adds(i.adds_to_bias)});
    }
  }

 private:
  FASTMETA_HOST_DEVICE static Product<storage_t> product(Form form, int64_t m, int64_t n, int64_t k,
                                                         Array<storage_t> c) {
    return {form, m, n, k, c};
  }
  FASTMETA_HOST_DEVICE static void add_where_there(Product<storage_t>& p, Array<storage_t> a,
                                                   Array<storage_t> b) {
    if (a && b) p.add(a, b);
  }
};

}  // namespace fastmeta
