// Norm of channels over a set of examples and positions: of the whole batch for each channel (batch
// norm, Ioffe 2015), or of one example for each group of channels (group norm, Wu 2018); weight g
// and bias b [C], either may be missing; then, in one step, ReLU and a max pool of 2 x 2. With mean
// and s = sqrt(biased variance + eps) of a set, xh = (x - mean)/s, means over the set, and dy the
// gradient that reaches a place through the pool and the ReLU (at the picked places):
//
//   forward           y = g xh + b
//   tangent forward   s_dot = mean(xh x_dot)        xh_dot = (x_dot - mean(x_dot) - xh s_dot)/s
//                     y_dot = g_dot xh + g xh_dot + b_dot
//   backward          u = g dy, a = mean(u), c = mean(u xh)         dx = (u - a - xh c)/s
//                     dg = sum of dy xh                             db = sum of dy
//   tangent backward  u_dot = g_dot dy + g dy_dot, a_dot = mean(u_dot),
//                     c_dot = mean(u_dot xh + u xh_dot)
//                     dx_dot = (u_dot - a_dot - xh_dot c - xh c_dot - dx s_dot)/s
//                     dg_dot = sum of (dy_dot xh + dy xh_dot)       db_dot = sum of dy_dot
//
// On given mean and variance, [C] each and not adapted, s is no function of x: s_dot, mean(x_dot),
// a, c and their tangents are 0. If weight and bias are [rows, C], a pass takes the row of its
// step.
//
// Means come from sums over positions of each channel. A set keeps them in 2 x C numbers, before
// the means of groups, 2 x C: behind y are moments, then mean and 1/s; behind dy sums of dy and dy
// xh, then a and c; behind the tangents the tangents of these.
#pragma once

#include "execution/elementwise.h"
#include "task_program/layers/norm_steps.h"
#include "task_program/program/network.h"

namespace fastmeta {

template <typename storage_t>
struct NormLayer {
  const Network<storage_t>& net;
  const Instruction& i;

  template <typename Executor>
  FASTMETA_HOST_DEVICE void forward(Executor& exec) const {
    const auto l = arrays(false);
    if (!i.has_moments && !has_given()) {
      exec.column_moments(l.in, l.whole_batch, l.x, l.statistics);
    }
    statistics(exec, l);
    with_form([&](auto form) { exec.table(l.out, NormForward<decltype(form), storage_t>{l}); });
  }

  template <typename Executor>
  FASTMETA_HOST_DEVICE void tangent_forward(Executor& exec) const {
    const auto l = arrays(true);
    if (l.x_dot) {
      if (!has_given()) {
        exec.column_sums(l.in, l.whole_batch, NormTangentSums<storage_t>{l}, l.statistics_dot);
      }
      means(exec, l, l.statistics_dot, {}, {}, {});
    }
    with_form(
        [&](auto form) { exec.table(l.out, NormTangentForward<decltype(form), storage_t>{l}); });
  }

  template <typename Executor, typename Update>
  FASTMETA_HOST_DEVICE void backward(Executor& exec, ParameterGradient<storage_t> grads, bool adds,
                                     const Update& update) const {
    const auto l = arrays(false);
    with_form([&](auto form) {
      using Form = decltype(form);
      if (needs_sums(static_cast<bool>(grads))) {
        exec.column_sums(l.out, l.whole_batch, NormBackwardSums<Form, storage_t>{l}, l.sums);
      }
      means(exec, l, l.sums, l.weight, {}, {});
      if (l.dx) exec.table(l.in, NormBackward<Form, storage_t>{l});
    });
    if (grads) parameter_gradients(exec, l, l.sums, grads, {adds}, update);
  }

  template <typename Executor>
  FASTMETA_HOST_DEVICE void tangent_backward(Executor& exec, ParameterGradient<storage_t> target,
                                             const StoreMode<storage_t>& into) const {
    const auto l = arrays(true);
    with_form([&](auto form) {
      using Form = decltype(form);
      if (needs_sums(true)) {
        exec.column_sums(l.out, l.whole_batch, NormTangentBackwardSums<Form, storage_t>{l},
                         l.sums_dot);
      }
      means(exec, l, l.sums_dot, l.weight, l.sums, l.weight_dot);
      if (l.dx_dot) exec.table(l.in, NormTangentBackward<Form, storage_t>{l});
    });
    parameter_gradients(exec, l, l.sums_dot, target, into, NoUpdate{});
  }

  // Parts of the passes.

  FASTMETA_HOST_DEVICE NormArrays<storage_t> arrays(bool tangents) const {
    const int64_t count = net.examples.count, channels = i.inputs;
    NormArrays<storage_t> l{};
    l.in = {count, 1, net.info(i.x).elements / channels, channels};
    l.out = l.in;
    if (i.max_pool) {
      l.in = {count, i.pool.height, i.pool.width, channels};
      l.out = {count, i.pool.out_height(), i.pool.out_width(), channels};
    }
    l.whole_batch = i.groups == 0;
    l.of_group = l.whole_batch ? 1 : channels / i.groups;
    l.eps = i.a;
    l.adds_to_x = i.adds_to_x;
    l.x = net.value(i.x);
    l.y = net.value(i.y);
    l.statistics = net.extra(i.y);
    l.pick = l.statistics.from(4 * channels * count);
    l.picked = l.pick.from(net.size(i.y));
    l.weight = net.parameter(of_step(i.weight));
    l.bias = net.parameter(of_step(i.bias));
    l.dy = net.delta(i.y);
    l.sums = l.dy.from(net.size(i.y));
    l.dx = net.delta(i.x);
    if (tangents) {
      l.x_dot = net.value_dot(i.x);
      l.y_dot = net.value_dot(i.y);
      l.statistics_dot = net.extra_dot(i.y);
      l.weight_dot = net.tangent_of(of_step(i.weight));
      l.bias_dot = net.tangent_of(of_step(i.bias));
      l.dy_dot = net.delta_dot(i.y);
      l.sums_dot = l.dy_dot.from(net.size(i.y));
      l.dx_dot = net.delta_dot(i.x);
    }
    return l;
  }

  template <typename Executor>
  FASTMETA_HOST_DEVICE void statistics(Executor& exec, const NormArrays<storage_t>& l) const {
    if (has_given()) {
      exec.map(i.inputs, GivenStatistics<storage_t>{i.inputs, l.eps, net.parameter(i.mean),
                                                    net.parameter(i.variance), l.statistics});
    } else {
      exec.rows(l.sets(), NormStatistics<storage_t>{l});
    }
  }

  template <typename Executor>
  FASTMETA_HOST_DEVICE void means(Executor& exec, const NormArrays<storage_t>& l,
                                  Array<storage_t> sums, Array<storage_t> weight,
                                  Array<storage_t> other_sums, Array<storage_t> weight_dot) const {
    if (has_given()) {
      exec.map(2 * i.inputs, Fill<storage_t>{0, sums.from(2 * i.inputs)});
    } else {
      exec.rows(l.sets(), NormMeans<storage_t>{i.inputs, l.of_group, l.set_size(), sums, weight,
                                               other_sums, weight_dot});
    }
  }

  // Computes parameter gradients from the two sums of each set.
  template <typename Executor, typename Update>
  FASTMETA_HOST_DEVICE void parameter_gradients(Executor& exec, const NormArrays<storage_t>& l,
                                                Array<storage_t> sums,
                                                ParameterGradient<storage_t> target,
                                                const StoreMode<storage_t>& into,
                                                const Update& update) const {
    using Finish = decltype(update.from(0));
    const auto add_up = [&](int64_t parameter, bool adds, Array<storage_t> source) {
      const auto part = target.at(parameter);
      if (!part) return;
      exec.map(i.inputs, ColumnSums<storage_t, Finish>{l.sets(), 4 * i.inputs, source, part,
                                                       into.or_adds(adds), update.from(parameter)});
    };
    add_up(of_step(i.weight), i.adds_to_weight, sums.from(i.inputs));
    add_up(of_step(i.bias), i.adds_to_bias, sums);
  }

 private:
  FASTMETA_HOST_DEVICE bool has_given() const { return i.mean != kNoParameter; }

  // Whether sums over positions are needed. On given statistics only the gradients of weight and
  // bias are such sums.
  FASTMETA_HOST_DEVICE bool needs_sums(bool wants_gradients) const {
    return !has_given() || (wants_gradients && (is_learned(i.weight) || is_learned(i.bias)));
  }

  // Offset of the row of a weight or bias that the pass at theta_k reads.
  FASTMETA_HOST_DEVICE int64_t of_step(int64_t parameter) const {
    const int64_t last = i.parameter_rows - 1;
    return parameter_behind(parameter, (net.step < last ? net.step : last) * i.inputs);
  }

  template <typename Fn>
  FASTMETA_HOST_DEVICE void with_form(const Fn& fn) const {
    if (i.max_pool) {
      fn(NormForm<true, true>{});
    } else if (i.relu) {
      fn(NormForm<true, false>{});
    } else {
      fn(NormForm<false, false>{});
    }
  }
};

}  // namespace fastmeta
