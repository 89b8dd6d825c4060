// The steps of a norm's four passes, each for one cell; formulas in norm.h.
#pragma once

#include "task_program/layers/norm_cell.h"

namespace fastmeta {

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

}  // namespace fastmeta
