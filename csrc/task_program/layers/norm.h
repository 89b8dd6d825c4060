// Norm of channels over a set of examples and positions: of the whole batch for each channel (batch
// norm, Ioffe 2015), or of one example for each group of channels (group norm, Wu 2018); weight g and
// bias b [C], either may be missing; then, in one step, ReLU and a max pool of 2 x 2. With mean and
// s = sqrt(biased variance + eps) of a set, xh = (x - mean)/s, means over the set, and dy the
// gradient that reaches a place through the pool and the ReLU (at the places that were picked):
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
// On given mean and variance, [C] each and not adapted, s is no function of x: s_dot, mean(x_dot), a,
// c and their tangents are 0. Of weight and bias [rows, C] a pass takes the row of its step.
//
// Means come from sums over positions of each channel, which are kept for each set, 2 x C numbers,
// before the means of groups, 2 x C: behind y moments, then mean and 1/s; behind dy sums of dy and
// dy xh, then a and c; behind the tangents the same of those.
#pragma once

#include "execution/elementwise.h"
#include "execution/math.h"
#include "task_program/program/network.h"

namespace fastmeta {

// What follows the norm in one step. picks: which place of a window its output comes from, -1 where
// ReLU is not active, and x there are kept.
template <bool has_relu, bool picks>
struct NormForm {
  static constexpr bool kRelu = has_relu, kPicks = picks;
};

template <typename storage_t>
struct NormArrays {
  Images in, out;
  bool whole_batch;
  int64_t of_group;  // channels
  double eps;
  bool adds_to_x;
  Array<storage_t> x, y, statistics, pick, picked, weight, bias, dy, sums, dx;
  Array<storage_t> x_dot, y_dot, statistics_dot, weight_dot, bias_dot, dy_dot, sums_dot, dx_dot;

  FASTMETA_HOST_DEVICE int64_t sets() const { return whole_batch ? 1 : in.count; }
  FASTMETA_HOST_DEVICE int64_t set_size() const { return in.positions() / sets() * of_group; }
};

// means of the set's groups from the moments of their channels: mean and 1/s. A row is a set.
template <typename storage_t>
struct NormStatistics {
  NormArrays<storage_t> l;

  template <typename Team>
  FASTMETA_HOST_DEVICE void operator()(const Team& team, int64_t set) const {
    using number_t = typename Team::number_t;
    const int64_t channels = l.in.channels, begin = set * 4 * channels;
    const number_t rows(static_cast<double>(l.set_size() / l.of_group));
    for (int64_t j = team.lane; j < channels; j += team.size) {
      const int64_t first = begin + j / l.of_group * l.of_group;
      number_t mean(0), squares(0);
      for (int64_t c = 0; c < l.of_group; ++c) mean = mean + team.load(l.statistics, first + c);
      mean = mean * number_t(1.0 / l.of_group);
      for (int64_t c = 0; c < l.of_group; ++c) {
        const number_t distance = team.load(l.statistics, first + c) - mean;
        squares =
            squares + team.load(l.statistics, first + channels + c) + rows * distance * distance;
      }
      const number_t variance = squares * number_t(1.0 / l.set_size());
      team.store(l.statistics, begin + 2 * channels + j, mean);
      team.store(l.statistics, begin + 3 * channels + j,
                 number_t(1) / Math<number_t>::sqrt(variance + number_t(l.eps)));
    }
  }
};

// Mean and 1/s of given statistics, where NormStatistics puts them; a cell is a channel.
template <typename storage_t>
struct GivenStatistics {
  int64_t channels;
  double eps;
  Array<storage_t> mean, variance, statistics;

  template <typename Cell>
  FASTMETA_HOST_DEVICE void operator()(const Cell& at) const {
    using number_t = typename Cell::number_t;
    at.store(statistics, at.load(mean), 2 * channels);
    at.store(statistics, number_t(1) / Math<number_t>::sqrt(at.load(variance) + number_t(eps)),
             3 * channels);
  }
};

// Both means of a set's groups from the sums of their channels, each times its weight, and, where
// there are tangents of weights, other sums times those.
template <typename storage_t>
struct NormMeans {
  int64_t channels, of_group, set_size;
  Array<storage_t> sums, weight, other_sums, weight_dot;

  template <typename Team>
  FASTMETA_HOST_DEVICE void operator()(const Team& team, int64_t set) const {
    for (int64_t j = team.lane; j < 2 * channels; j += team.size) {
      const int64_t channel = j % channels, group = channel / of_group * of_group;
      const int64_t first = set * 4 * channels + j - channel;
      typename Team::number_t sum(0);
      for (int64_t c = group; c < group + of_group; ++c) {
        const auto one = team.load(sums, first + c);
        sum = sum + (weight ? one * team.load(weight, c) : one);
        if (weight_dot) sum = sum + team.load(other_sums, first + c) * team.load(weight_dot, c);
      }
      team.store(sums, first + 2 * channels + channel, sum * decltype(sum)(1.0 / set_size));
    }
  }
};

// What the steps know of a cell: of the norm's input, or (of_output) of its output.
template <typename Form, bool of_output, typename storage_t, typename Cell>
struct NormCell {
  using number_t = typename Cell::number_t;
  using M = Math<number_t>;
  const NormArrays<storage_t>& l;
  const Cell& at;

  FASTMETA_HOST_DEVICE int64_t channels() const { return l.in.channels; }
  FASTMETA_HOST_DEVICE number_t of_channel(const Array<storage_t>& a) const {
    return at.load(a, 0);
  }
  // Number `which` of 4 that a set keeps for each channel.
  FASTMETA_HOST_DEVICE number_t kept(const Array<storage_t>& a, int which) const {
    const int64_t set = l.whole_batch ? 0 : at.image;
    return at.load(a, (set * 4 + which) * channels());
  }
  FASTMETA_HOST_DEVICE number_t mean() const { return kept(l.statistics, 2); }
  FASTMETA_HOST_DEVICE number_t inverse() const { return kept(l.statistics, 3); }
  FASTMETA_HOST_DEVICE number_t xh(const number_t& x) const { return (x - mean()) * inverse(); }
  FASTMETA_HOST_DEVICE number_t xh_dot(const number_t& xh_here, const number_t& x_dot) const {
    const number_t centred = x_dot - kept(l.statistics_dot, 2);
    return (centred - xh_here * kept(l.statistics_dot, 3)) * inverse();
  }
  FASTMETA_HOST_DEVICE number_t weighted(const number_t& value) const {
    return l.weight ? value * of_channel(l.weight) : value;
  }

  FASTMETA_HOST_DEVICE int64_t here() const {
    return (of_output ? l.out : l.in).place(at.image, at.h, at.w);
  }
  // Of a window's place 0 .. 3 in the input.
  FASTMETA_HOST_DEVICE int64_t place(int k) const {
    return l.in.place(at.image, 2 * at.h + k / 2, 2 * at.w + k % 2);
  }
  FASTMETA_HOST_DEVICE number_t picked() const { return at.load(l.pick, here()); }

  // x at the place that an output comes from.
  FASTMETA_HOST_DEVICE number_t source_x() const {
    static_assert(of_output);
    return at.load(Form::kPicks ? l.picked : l.x, here());
  }
  // And an array like x there.
  FASTMETA_HOST_DEVICE number_t source(const Array<storage_t>& a) const {
    static_assert(of_output);
    if constexpr (Form::kPicks) {
      const number_t pick = picked();
      number_t value = at.load(a, place(0));
      for (int k = 1; k < 4; ++k)
        value = M::if_equal(pick, number_t(k), at.load(a, place(k)), value);
      return value;
    } else {
      return at.load(a, here());
    }
  }
  // Zero where ReLU is not active at an output.
  FASTMETA_HOST_DEVICE number_t if_active(const number_t& value) const {
    static_assert(of_output);
    if constexpr (Form::kPicks) {
      return M::if_less(picked(), number_t(0), number_t(0), value);
    } else if constexpr (Form::kRelu) {
      return M::if_less(number_t(0), at.load(l.y, here()), value, number_t(0));
    } else {
      return value;
    }
  }
  // What comes to a place of the input from an array like dy.
  FASTMETA_HOST_DEVICE number_t upstream(const Array<storage_t>& a) const {
    static_assert(!of_output);
    if constexpr (Form::kPicks) {
      if (at.h / 2 >= l.out.height || at.w / 2 >= l.out.width) return number_t(0);
      const int64_t window = l.out.place(at.image, at.h / 2, at.w / 2);
      const number_t k(static_cast<double>(at.h % 2 * 2 + at.w % 2));
      return M::if_equal(at.load(l.pick, window), k, at.load(a, window), number_t(0));
    } else if constexpr (Form::kRelu) {
      return M::if_less(number_t(0), at.load(l.y, here()), at.load(a, here()), number_t(0));
    } else {
      return at.load(a, here());
    }
  }
};

template <typename Form, bool of_output, typename storage_t, typename Cell>
FASTMETA_HOST_DEVICE NormCell<Form, of_output, storage_t, Cell> norm_cell(
    const NormArrays<storage_t>& l, const Cell& at) {
  return {l, at};
}

template <typename Form, typename storage_t>
struct NormForward {
  NormArrays<storage_t> l;

  template <typename Cell>
  FASTMETA_HOST_DEVICE void operator()(const Cell& at) const {
    using number_t = typename Cell::number_t;
    using M = Math<number_t>;
    const auto cell = norm_cell<Form, true>(l, at);
    const number_t mean = cell.mean(), scale = cell.weighted(cell.inverse());
    const number_t shift = l.bias ? cell.of_channel(l.bias) : number_t(0);
    const auto norm = [&](const number_t& x) { return (x - mean) * scale + shift; };
    if constexpr (Form::kPicks) {
      number_t best_x = at.load(l.x, cell.place(0)), best = norm(best_x), pick(0);
      for (int k = 1; k < 4; ++k) {
        const number_t x = at.load(l.x, cell.place(k)), other = norm(x);
        pick = M::if_less(best, other, number_t(k), pick);
        best_x = M::if_less(best, other, x, best_x);
        best = M::if_less(best, other, other, best);
      }
      at.store(l.picked, cell.here(), best_x);
      at.store(l.pick, cell.here(), M::if_less(number_t(0), best, pick, number_t(-1)));
      at.store(l.y, cell.here(), M::if_less(best, number_t(0), number_t(0), best));
    } else {
      const number_t y = norm(at.load(l.x, cell.here()));
      at.store(l.y, cell.here(), Form::kRelu ? M::if_less(y, number_t(0), number_t(0), y) : y);
    }
  }
};

// Sums of x_dot and xh x_dot.
template <typename storage_t>
struct NormTangentSums {
  NormArrays<storage_t> l;

  template <typename Cell>
  FASTMETA_HOST_DEVICE auto operator()(const Cell& at) const {
    const auto cell = norm_cell<NormForm<false, false>, false>(l, at);
    const auto x_dot = at.load(l.x_dot, cell.here());
    return Two<typename Cell::number_t>{x_dot, x_dot * cell.xh(at.load(l.x, cell.here()))};
  }
};

template <typename Form, typename storage_t>
struct NormTangentForward {
  NormArrays<storage_t> l;

  template <typename Cell>
  FASTMETA_HOST_DEVICE void operator()(const Cell& at) const {
    using number_t = typename Cell::number_t;
    const auto cell = norm_cell<Form, true>(l, at);
    number_t y_dot(0);
    if (l.x_dot || l.weight_dot) {
      const number_t xh = cell.xh(cell.source_x());
      if (l.x_dot) y_dot = cell.weighted(cell.xh_dot(xh, cell.source(l.x_dot)));
      if (l.weight_dot) y_dot = y_dot + cell.of_channel(l.weight_dot) * xh;
    }
    if (l.bias_dot) y_dot = y_dot + cell.of_channel(l.bias_dot);
    at.store(l.y_dot, cell.here(), cell.if_active(y_dot));
  }
};

// Sums of dy and dy xh.
template <typename Form, typename storage_t>
struct NormBackwardSums {
  NormArrays<storage_t> l;

  template <typename Cell>
  FASTMETA_HOST_DEVICE auto operator()(const Cell& at) const {
    const auto cell = norm_cell<Form, true>(l, at);
    const auto dy = cell.if_active(at.load(l.dy, cell.here()));
    return Two<typename Cell::number_t>{dy, dy * cell.xh(cell.source_x())};
  }
};

template <typename Form, typename storage_t>
struct NormBackward {
  NormArrays<storage_t> l;

  template <typename Cell>
  FASTMETA_HOST_DEVICE void operator()(const Cell& at) const {
    const auto cell = norm_cell<Form, false>(l, at);
    const auto u = cell.weighted(cell.upstream(l.dy));
    const auto xh = cell.xh(at.load(l.x, cell.here()));
    const auto dx = (u - cell.kept(l.sums, 2) - xh * cell.kept(l.sums, 3)) * cell.inverse();
    at.store(l.dx, cell.here(), l.adds_to_x ? at.load(l.dx, cell.here()) + dx : dx);
  }
};

// Sums of dy_dot and dy_dot xh + dy xh_dot.
template <typename Form, typename storage_t>
struct NormTangentBackwardSums {
  NormArrays<storage_t> l;

  template <typename Cell>
  FASTMETA_HOST_DEVICE auto operator()(const Cell& at) const {
    const auto cell = norm_cell<Form, true>(l, at);
    const auto dy_dot = cell.if_active(at.load(l.dy_dot, cell.here()));
    const auto xh = cell.xh(cell.source_x());
    auto second = dy_dot * xh;
    if (l.x_dot) {
      const auto dy = cell.if_active(at.load(l.dy, cell.here()));
      second = second + dy * cell.xh_dot(xh, cell.source(l.x_dot));
    }
    return Two<typename Cell::number_t>{dy_dot, second};
  }
};

template <typename Form, typename storage_t>
struct NormTangentBackward {
  NormArrays<storage_t> l;

  template <typename Cell>
  FASTMETA_HOST_DEVICE void operator()(const Cell& at) const {
    using number_t = typename Cell::number_t;
    const auto cell = norm_cell<Form, false>(l, at);
    const number_t dy = cell.upstream(l.dy), inverse = cell.inverse();
    const number_t xh = cell.xh(at.load(l.x, cell.here())), c = cell.kept(l.sums, 3);
    number_t change = cell.weighted(cell.upstream(l.dy_dot));
    if (l.weight_dot) change = change + cell.of_channel(l.weight_dot) * dy;
    change = change - cell.kept(l.sums_dot, 2) - xh * cell.kept(l.sums_dot, 3);
    if (l.x_dot) {
      const number_t dx = (cell.weighted(dy) - cell.kept(l.sums, 2) - xh * c) * inverse;
      change = change - cell.xh_dot(xh, at.load(l.x_dot, cell.here())) * c -
               dx * cell.kept(l.statistics_dot, 3);
    }
    const number_t dx_dot = change * inverse;
    at.store(l.dx_dot, cell.here(), l.adds_to_x ? at.load(l.dx_dot, cell.here()) + dx_dot : dx_dot);
  }
};

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
  FASTMETA_HOST_DEVICE void backward(Executor& exec, Array<storage_t> grads, bool adds,
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
  FASTMETA_HOST_DEVICE void tangent_backward(Executor& exec, Array<storage_t> target,
                                             const Accumulation<storage_t>& into) const {
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

  // The parts of the passes.

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
    l.weight = net.parameters.at(of_step(i.weight));
    l.bias = net.parameters.at(of_step(i.bias));
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
      exec.map(i.inputs, GivenStatistics<storage_t>{i.inputs, l.eps, net.parameters.at(i.mean),
                                                    net.parameters.at(i.variance), l.statistics});
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

  // From the two sums of each set.
  template <typename Executor, typename Update>
  FASTMETA_HOST_DEVICE void parameter_gradients(Executor& exec, const NormArrays<storage_t>& l,
                                                Array<storage_t> sums, Array<storage_t> target,
                                                const Accumulation<storage_t>& into,
                                                const Update& update) const {
    using Finish = decltype(update.from(0));
    const auto add_up = [&](int64_t parameter, bool adds, Array<storage_t> source) {
      if (!is_adapted(parameter)) return;
      exec.map(i.inputs,
               ColumnSums<storage_t, Finish>{l.sets(), 4 * i.inputs, source, target.from(parameter),
                                             into.or_adds(adds), update.from(parameter)});
    };
    add_up(of_step(i.weight), i.adds_to_weight, sums.from(i.inputs));
    add_up(of_step(i.bias), i.adds_to_bias, sums);
  }

 private:
  FASTMETA_HOST_DEVICE bool has_given() const { return i.mean != kNoParameter; }

  // On given statistics only the gradients of weight and bias are sums over positions.
  FASTMETA_HOST_DEVICE bool needs_sums(bool wants_gradients) const {
    return !has_given() || (wants_gradients && (is_adapted(i.weight) || is_adapted(i.bias)));
  }

  // The row of a weight or bias that the pass at theta_k reads.
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
