// Steps of a norm's four passes, each for one accessor; formulas in norm.h.
#pragma once

#include "task_program/layers/norm_view.h"

namespace fastmeta {

template <typename Form, typename storage_t>
struct NormForward {
  NormArrays<storage_t> l;

  template <typename Accessor>
  FASTMETA_HOST_DEVICE void operator()(const Accessor& at) const {
    using number_t = typename Accessor::number_t;
    using M = Math<number_t>;
    const auto view = norm_view<Form, true>(l, at);
    const number_t mean = view.mean(), scale = view.weighted(view.inverse());
    const number_t shift = l.bias ? view.of_channel(l.bias) : number_t(0);
    const auto norm = [&](const number_t& x) { return (x - mean) * scale + shift; };
    if constexpr (Form::kPicks) {
      number_t best_x = at.load(l.x, view.place(0)), best = norm(best_x), pick(0);
      for (int k = 1; k < 4; ++k) {
        const number_t x = at.load(l.x, view.place(k)), other = norm(x);
        pick = M::if_less(best, other, number_t(k), pick);
        best_x = M::if_less(best, other, x, best_x);
        best = M::if_less(best, other, other, best);
      }
      at.store(l.picked, view.here(), best_x);
      at.store(l.pick, view.here(), M::if_less(number_t(0), best, pick, number_t(-1)));
      at.store(l.y, view.here(), M::if_less(best, number_t(0), number_t(0), best));
    } else {
      const number_t y = norm(at.load(l.x, view.here()));
      at.store(l.y, view.here(), Form::kRelu ? M::if_less(y, number_t(0), number_t(0), y) : y);
    }
  }
};

// Sums of x_dot and xh x_dot.
template <typename storage_t>
struct NormTangentSums {
  NormArrays<storage_t> l;

  template <typename Accessor>
  FASTMETA_HOST_DEVICE auto operator()(const Accessor& at) const {
    const auto view = norm_view<NormForm<false, false>, false>(l, at);
    const auto x_dot = at.load(l.x_dot, view.here());
    return Two<typename Accessor::number_t>{x_dot, x_dot * view.xh(at.load(l.x, view.here()))};
  }
};

template <typename Form, typename storage_t>
struct NormTangentForward {
  NormArrays<storage_t> l;

  template <typename Accessor>
  FASTMETA_HOST_DEVICE void operator()(const Accessor& at) const {
    using number_t = typename Accessor::number_t;
    const auto view = norm_view<Form, true>(l, at);
    number_t y_dot(0);
    if (l.x_dot || l.weight_dot) {
      const number_t xh = view.xh(view.source_x());
      if (l.x_dot) y_dot = view.weighted(view.xh_dot(xh, view.source(l.x_dot)));
      if (l.weight_dot) y_dot = y_dot + view.of_channel(l.weight_dot) * xh;
    }
    if (l.bias_dot) y_dot = y_dot + view.of_channel(l.bias_dot);
    at.store(l.y_dot, view.here(), view.if_active(y_dot));
  }
};

// Sums of dy and dy xh.
template <typename Form, typename storage_t>
struct NormBackwardSums {
  NormArrays<storage_t> l;

  template <typename Accessor>
  FASTMETA_HOST_DEVICE auto operator()(const Accessor& at) const {
    const auto view = norm_view<Form, true>(l, at);
    const auto dy = view.if_active(at.load(l.dy, view.here()));
    return Two<typename Accessor::number_t>{dy, dy * view.xh(view.source_x())};
  }
};

template <typename Form, typename storage_t>
struct NormBackward {
  NormArrays<storage_t> l;

  template <typename Accessor>
  FASTMETA_HOST_DEVICE void operator()(const Accessor& at) const {
    const auto view = norm_view<Form, false>(l, at);
    const auto u = view.weighted(view.upstream(l.dy));
    const auto xh = view.xh(at.load(l.x, view.here()));
    const auto dx = (u - view.kept(l.sums, 2) - xh * view.kept(l.sums, 3)) * view.inverse();
    at.store(l.dx, view.here(), l.adds_to_x ? at.load(l.dx, view.here()) + dx : dx);
  }
};

// Sums of dy_dot and dy_dot xh + dy xh_dot.
template <typename Form, typename storage_t>
struct NormTangentBackwardSums {
  NormArrays<storage_t> l;

  template <typename Accessor>
  FASTMETA_HOST_DEVICE auto operator()(const Accessor& at) const {
    const auto view = norm_view<Form, true>(l, at);
    const auto dy_dot = view.if_active(at.load(l.dy_dot, view.here()));
    const auto xh = view.xh(view.source_x());
    auto second = dy_dot * xh;
    if (l.x_dot) {
      const auto dy = view.if_active(at.load(l.dy, view.here()));
      second = second + dy * view.xh_dot(xh, view.source(l.x_dot));
    }
    return Two<typename Accessor::number_t>{dy_dot, second};
  }
};

template <typename Form, typename storage_t>
struct NormTangentBackward {
  NormArrays<storage_t> l;

  template <typename Accessor>
  FASTMETA_HOST_DEVICE void operator()(const Accessor& at) const {
    using number_t = typename Accessor::number_t;
    const auto view = norm_view<Form, false>(l, at);
    const number_t dy = view.upstream(l.dy), inverse = view.inverse();
    const number_t xh = view.xh(at.load(l.x, view.here())), c = view.kept(l.sums, 3);
    number_t change = view.weighted(view.upstream(l.dy_dot));
    if (l.weight_dot) change = change + view.of_channel(l.weight_dot) * dy;
    change = change - view.kept(l.sums_dot, 2) - xh * view.kept(l.sums_dot, 3);
    if (l.x_dot) {
      const number_t dx = (view.weighted(dy) - view.kept(l.sums, 2) - xh * c) * inverse;
      change = change - view.xh_dot(xh, at.load(l.x_dot, view.here())) * c -
               dx * view.kept(l.statistics_dot, 3);
    }
    const number_t dx_dot = change * inverse;
    at.store(l.dx_dot, view.here(), l.adds_to_x ? at.load(l.dx_dot, view.here()) + dx_dot : dx_dot);
  }
};

}  // namespace fastmeta
