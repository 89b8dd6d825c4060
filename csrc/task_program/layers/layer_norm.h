// Layer norm over the last D elements (Ba 2016), weight g and bias b [D], either may be missing.
// With mean and s = sqrt(biased variance + eps) of a row, xh = (x - mean)/s, means over the row:
//
//   forward           y = g xh + b
//   tangent forward   s_dot = mean(xh x_dot)        xh_dot = (x_dot - mean(x_dot) - xh s_dot)/s
//                     y_dot = g_dot xh + g xh_dot + b_dot
//   backward          u = g dy, a = mean(u), c = mean(u xh)         dx = (u - a - xh c)/s
//                     dg = sum over rows of dy xh                   db = sum over rows of dy
//   tangent backward  u_dot = g_dot dy + g dy_dot, a_dot = mean(u_dot),
//                     c_dot = mean(u_dot xh + u xh_dot)
//                     dx_dot = (u_dot - a_dot - xh_dot c - xh c_dot - dx s_dot)/s
//                     dg_dot = sum of (dy_dot xh + dy xh_dot)       db_dot = sum of dy_dot
//
// Kept beside y for each row: mean and 1/s; beside y_dot: mean(x_dot) and s_dot.
#pragma once

#include "execution/elementwise.h"
#include "execution/math.h"
#include "task_program/program/network.h"

namespace fastmeta {

template <typename storage_t>
struct LayerNormArrays {
  int64_t rows, size;  // size: D
  double eps;
  Array<storage_t> x, y, extra, weight, bias, dy, dx;
  Array<storage_t> x_dot, y_dot, extra_dot, weight_dot, bias_dot, dy_dot, dx_dot;
  bool adds_to_x;
};

// Row of all arrays, for thread groups.
template <typename storage_t, typename ThreadGroup>
struct LayerNormRow {
  using number_t = typename ThreadGroup::number_t;
  const LayerNormArrays<storage_t>& l;
  const ThreadGroup& group;
  int64_t row;

  FASTMETA_HOST_DEVICE int64_t begin() const { return row * l.size; }
  FASTMETA_HOST_DEVICE number_t mean() const { return group.load(l.extra, 2 * row); }
  FASTMETA_HOST_DEVICE number_t inverse() const { return group.load(l.extra, 2 * row + 1); }
  FASTMETA_HOST_DEVICE number_t mean_dot() const { return group.load(l.extra_dot, 2 * row); }
  FASTMETA_HOST_DEVICE number_t s_dot() const { return group.load(l.extra_dot, 2 * row + 1); }

  FASTMETA_HOST_DEVICE number_t xh(int64_t j) const {
    return (group.load(l.x, begin() + j) - mean()) * inverse();
  }
  FASTMETA_HOST_DEVICE number_t xh_dot(int64_t j) const {
    if (!l.x_dot) return number_t(0);
    const number_t centred = group.load(l.x_dot, begin() + j) - mean_dot();
    return (centred - xh(j) * s_dot()) * inverse();
  }
  FASTMETA_HOST_DEVICE number_t scaled(Array<storage_t> array, int64_t j) const {
    const number_t value = group.load(array, begin() + j);
    return l.weight ? value * group.load(l.weight, j) : value;
  }
  FASTMETA_HOST_DEVICE number_t u_dot(int64_t j) const {
    const number_t value = scaled(l.dy_dot, j);
    if (!l.weight_dot) return value;
    return value + group.load(l.weight_dot, j) * group.load(l.dy, begin() + j);
  }
  // Mean of f(j) over the row.
  template <typename F>
  FASTMETA_HOST_DEVICE number_t mean_of(const F& f) const {
    number_t sum(0);
    for (int64_t j = group.lane; j < l.size; j += group.size) sum = sum + f(j);
    return group.sum(sum) * number_t(1.0 / l.size);
  }
  FASTMETA_HOST_DEVICE void keep(Array<storage_t> target, const number_t& first,
                                 const number_t& second) const {
    if (group.lane == 0) {
      group.store(target, 2 * row, first);
      group.store(target, 2 * row + 1, second);
    }
  }
  FASTMETA_HOST_DEVICE void put(Array<storage_t> target, int64_t j, const number_t& value) const {
    const int64_t place = begin() + j;
    group.store(target, place, l.adds_to_x ? group.load(target, place) + value : value);
  }
};

template <typename storage_t>
struct LayerNormForward {
  LayerNormArrays<storage_t> l;

  template <typename ThreadGroup>
  FASTMETA_HOST_DEVICE void operator()(const ThreadGroup& group, int64_t row) const {
    using number_t = typename ThreadGroup::number_t;
    const LayerNormRow<storage_t, ThreadGroup> r{l, group, row};
    const auto x = [&](int64_t j) { return group.load(l.x, r.begin() + j); };
    const number_t mean = r.mean_of(x);
    const number_t variance = r.mean_of([&](int64_t j) { return (x(j) - mean) * (x(j) - mean); });
    const number_t inverse = number_t(1) / Math<number_t>::sqrt(variance + number_t(l.eps));
    r.keep(l.extra, mean, inverse);
    for (int64_t j = group.lane; j < l.size; j += group.size) {
      number_t y = (x(j) - mean) * inverse;
      if (l.weight) y = y * group.load(l.weight, j);
      if (l.bias) y = y + group.load(l.bias, j);
      group.store(l.y, r.begin() + j, y);
    }
  }
};

template <typename storage_t>
struct LayerNormTangentForward {
  LayerNormArrays<storage_t> l;

  template <typename ThreadGroup>
  FASTMETA_HOST_DEVICE void operator()(const ThreadGroup& group, int64_t row) const {
    using number_t = typename ThreadGroup::number_t;
    const LayerNormRow<storage_t, ThreadGroup> r{l, group, row};
    number_t mean_dot(0), s_dot(0);
    if (l.x_dot) {
      const auto x_dot = [&](int64_t j) { return group.load(l.x_dot, r.begin() + j); };
      mean_dot = r.mean_of(x_dot);
      s_dot = r.mean_of([&](int64_t j) { return r.xh(j) * x_dot(j); });
    }
    r.keep(l.extra_dot, mean_dot, s_dot);
    const number_t inverse = r.inverse();
    for (int64_t j = group.lane; j < l.size; j += group.size) {
      number_t y_dot(0);
      const number_t xh = r.xh(j);
      if (l.x_dot) {
        y_dot = (group.load(l.x_dot, r.begin() + j) - mean_dot - xh * s_dot) * inverse;
        if (l.weight) y_dot = y_dot * group.load(l.weight, j);
      }
      if (l.weight_dot) y_dot = y_dot + group.load(l.weight_dot, j) * xh;
      if (l.bias_dot) y_dot = y_dot + group.load(l.bias_dot, j);
      group.store(l.y_dot, r.begin() + j, y_dot);
    }
  }
};

template <typename storage_t>
struct LayerNormBackward {
  LayerNormArrays<storage_t> l;

  template <typename ThreadGroup>
  FASTMETA_HOST_DEVICE void operator()(const ThreadGroup& group, int64_t row) const {
    using number_t = typename ThreadGroup::number_t;
    const LayerNormRow<storage_t, ThreadGroup> r{l, group, row};
    const number_t a = r.mean_of([&](int64_t j) { return r.scaled(l.dy, j); });
    const number_t c = r.mean_of([&](int64_t j) { return r.scaled(l.dy, j) * r.xh(j); });
    for (int64_t j = group.lane; j < l.size; j += group.size) {
      r.put(l.dx, j, (r.scaled(l.dy, j) - a - r.xh(j) * c) * r.inverse());
    }
  }
};

template <typename storage_t>
struct LayerNormTangentBackward {
  LayerNormArrays<storage_t> l;

  template <typename ThreadGroup>
  FASTMETA_HOST_DEVICE void operator()(const ThreadGroup& group, int64_t row) const {
    using number_t = typename ThreadGroup::number_t;
    const LayerNormRow<storage_t, ThreadGroup> r{l, group, row};
    const auto u = [&](int64_t j) { return r.scaled(l.dy, j); };
    const number_t a = r.mean_of(u);
    const number_t c = r.mean_of([&](int64_t j) { return u(j) * r.xh(j); });
    const number_t a_dot = r.mean_of([&](int64_t j) { return r.u_dot(j); });
    const number_t c_dot =
        r.mean_of([&](int64_t j) { return r.u_dot(j) * r.xh(j) + u(j) * r.xh_dot(j); });
    const number_t s_dot = l.x_dot ? r.s_dot() : number_t(0), inverse = r.inverse();
    for (int64_t j = group.lane; j < l.size; j += group.size) {
      const number_t dx = (u(j) - a - r.xh(j) * c) * inverse;
      const number_t change = r.u_dot(j) - a_dot - r.xh_dot(j) * c - r.xh(j) * c_dot - dx * s_dot;
      r.put(l.dx_dot, j, change * inverse);
    }
  }
};

// Computes target[j] (+)= sum over rows of dy xh, and with tangents of dy_dot xh + dy xh_dot; then
// finish. An accessor is a column.
template <typename storage_t, bool tangent, typename Finish>
struct LayerNormWeightGradient {
  LayerNormArrays<storage_t> l;
  Array<storage_t> target;
  StoreMode<storage_t> into;
  Finish finish;

  template <typename Accessor>
  FASTMETA_HOST_DEVICE void operator()(const Accessor& at) const {
    using number_t = typename Accessor::number_t;
    number_t sum(0);
    for (int64_t row = 0; row < l.rows; ++row) {
      const int64_t begin = row * l.size;
      const number_t inverse = at.load_one(l.extra, 2 * row + 1);
      const number_t xh = (at.load(l.x, begin) - at.load_one(l.extra, 2 * row)) * inverse;
      if constexpr (!tangent) {
        sum = sum + at.load(l.dy, begin) * xh;
      } else {
        sum = sum + at.load(l.dy_dot, begin) * xh;
        if (!l.x_dot) continue;
        const number_t centred = at.load(l.x_dot, begin) - at.load_one(l.extra_dot, 2 * row);
        const number_t xh_dot = (centred - xh * at.load_one(l.extra_dot, 2 * row + 1)) * inverse;
        sum = sum + at.load(l.dy, begin) * xh_dot;
      }
    }
    store_sum(at, target, into, sum);
    finish(at);
  }
};

template <typename storage_t>
struct LayerNorm {
  const Network<storage_t>& net;
  const Instruction& i;

  FASTMETA_HOST_DEVICE LayerNormArrays<storage_t> arrays(bool tangents) const {
    LayerNormArrays<storage_t> l{};
    l.size = i.inputs;
    l.rows = net.size(i.y) / i.inputs;
    l.eps = i.a;
    l.x = net.value(i.x);
    l.y = net.value(i.y);
    l.extra = net.extra(i.y);
    l.weight = net.parameter(i.weight);
    l.bias = net.parameter(i.bias);
    l.dy = net.delta(i.y);
    l.dx = net.delta(i.x);
    l.adds_to_x = i.adds_to_x;
    if (tangents) {
      l.x_dot = net.value_dot(i.x);
      l.y_dot = net.value_dot(i.y);
      l.extra_dot = net.extra_dot(i.y);
      l.weight_dot = net.tangent_of(i.weight);
      l.bias_dot = net.tangent_of(i.bias);
      l.dy_dot = net.delta_dot(i.y);
      l.dx_dot = net.delta_dot(i.x);
    }
    return l;
  }

  template <typename Executor>
  FASTMETA_HOST_DEVICE void forward(Executor& exec) const {
    const auto l = arrays(false);
    exec.rows(l.rows, LayerNormForward<storage_t>{l});
  }

  template <typename Executor>
  FASTMETA_HOST_DEVICE void tangent_forward(Executor& exec) const {
    const auto l = arrays(true);
    exec.rows(l.rows, LayerNormTangentForward<storage_t>{l});
  }

  template <typename Executor, typename Update>
  FASTMETA_HOST_DEVICE void backward(Executor& exec, ParameterGradient<storage_t> grads, bool adds,
                                     const Update& update) const {
    const auto l = arrays(false);
    if (l.dx) exec.rows(l.rows, LayerNormBackward<storage_t>{l});
    parameter_gradients<false>(exec, l, grads, {adds}, update);
  }

  template <typename Executor>
  FASTMETA_HOST_DEVICE void tangent_backward(Executor& exec, ParameterGradient<storage_t> target,
                                             const StoreMode<storage_t>& into) const {
    const auto l = arrays(true);
    if (l.dx_dot) exec.rows(l.rows, LayerNormTangentBackward<storage_t>{l});
    parameter_gradients<true>(exec, l, target, into, NoUpdate{});
  }

 private:
  template <bool tangent, typename Executor, typename Update>
  FASTMETA_HOST_DEVICE void parameter_gradients(Executor& exec, const LayerNormArrays<storage_t>& l,
                                                ParameterGradient<storage_t> target,
                                                const StoreMode<storage_t>& into,
                                                const Update& update) const {
    using Finish = decltype(update.from(0));
    if (const auto weight = target.at(i.weight)) {
      exec.map(l.size, LayerNormWeightGradient<storage_t, tangent, Finish>{
                           l, weight, into.or_adds(i.adds_to_weight), update.from(i.weight)});
    }
    if (const auto bias = target.at(i.bias)) {
      exec.map(l.size,
               ColumnSums<storage_t, Finish>{l.rows, l.size, tangent ? l.dy_dot : l.dy, bias,
                                             into.or_adds(i.adds_to_bias), update.from(i.bias)});
    }
  }
};

}  // namespace fastmeta
