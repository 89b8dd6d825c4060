// Pools of windows over channels-last images. Both are linear once the places of the maxima are
// known, so that tangents take the same routes:
//
//   forward           y = max of x, or its mean, over each window; for a maximum the first place that
//                     reaches it is kept beside y
//   tangent forward   y_dot = x_dot at that place, or its mean
//   backward          dx += dy at that place, or dy / count at each; tangent backward: dy_dot
#pragma once

#include "execution/math.h"
#include "task_program/program/network.h"

namespace fastmeta {

// Windows of a pool, in one direction.
struct PoolAxis {
  int64_t size, kernel, stride, padding, out;

  // Interval of places of window `o` within the image.
  FASTMETA_HOST_DEVICE int64_t first(int64_t o) const {
    const int64_t at = o * stride - padding;
    return at < 0 ? 0 : at;
  }
  FASTMETA_HOST_DEVICE int64_t end(int64_t o) const {
    const int64_t at = o * stride - padding + kernel;
    return at < size ? at : size;
  }
  // Interval of windows that have place `at`.
  FASTMETA_HOST_DEVICE int64_t first_window(int64_t at) const {
    const int64_t before = at + padding - kernel;
    return before < 0 ? 0 : before / stride + 1;
  }
  FASTMETA_HOST_DEVICE int64_t end_window(int64_t at) const {
    const int64_t last = (at + padding) / stride + 1;
    return last < out ? last : out;
  }
};

template <typename storage_t>
struct PoolArrays {
  PoolShape shape;
  Images in, out;
  Array<storage_t> pick;  // place of a maximum in the image, h width + w

  FASTMETA_HOST_DEVICE PoolAxis vertical() const {
    return {in.height, shape.kernel_h, shape.stride_h, shape.padding_h, out.height};
  }
  FASTMETA_HOST_DEVICE PoolAxis horizontal() const {
    return {in.width, shape.kernel_w, shape.stride_w, shape.padding_w, out.width};
  }
  // Calls fn(h, w) for the places of an output's window.
  template <typename Accessor, typename Fn>
  FASTMETA_HOST_DEVICE void for_window(const Accessor& at, const Fn& fn) const {
    const PoolAxis v = vertical(), u = horizontal();
    for (int64_t h = v.first(at.h); h < v.end(at.h); ++h) {
      for (int64_t w = u.first(at.w); w < u.end(at.w); ++w) fn(h, w);
    }
  }
  // Calls fn(h, w) for the outputs whose windows have an input's place.
  template <typename Accessor, typename Fn>
  FASTMETA_HOST_DEVICE void for_windows_at(const Accessor& at, const Fn& fn) const {
    const PoolAxis v = vertical(), u = horizontal();
    for (int64_t h = v.first_window(at.h); h < v.end_window(at.h); ++h) {
      for (int64_t w = u.first_window(at.w); w < u.end_window(at.w); ++w) fn(h, w);
    }
  }
  // One over the divisor of the sum of the window of output (h, w).
  FASTMETA_HOST_DEVICE double share(int64_t h, int64_t w) const {
    const PoolAxis v = vertical(), u = horizontal();
    const int64_t counted = shape.counts_padding
                                ? shape.kernel_h * shape.kernel_w
                                : (v.end(h) - v.first(h)) * (u.end(w) - u.first(w));
    return 1.0 / static_cast<double>(counted);
  }
};

template <typename storage_t>
struct MaxPoolForward {
  PoolArrays<storage_t> l;
  Array<storage_t> x, y;

  template <typename Accessor>
  FASTMETA_HOST_DEVICE void operator()(const Accessor& at) const {
    using number_t = typename Accessor::number_t;
    using M = Math<number_t>;
    number_t best(0), pick(-1);
    l.for_window(at, [&](int64_t h, int64_t w) {
      const number_t other = at.load(x, l.in.place(at.image, h, w));
      const number_t place(static_cast<double>(h * l.in.width + w)), before = pick;
      pick = M::if_less(before, number_t(0), place, M::if_less(best, other, place, before));
      best = M::if_less(before, number_t(0), other, M::if_less(best, other, other, best));
    });
    at.store(l.pick, l.out.place(at.image, at.h, at.w), pick);
    at.store(y, l.out.place(at.image, at.h, at.w), best);
  }
};

// Computes target = source at the places of the maxima.
template <typename storage_t>
struct MaxPoolGather {
  PoolArrays<storage_t> l;
  Array<storage_t> source, target;

  template <typename Accessor>
  FASTMETA_HOST_DEVICE void operator()(const Accessor& at) const {
    using number_t = typename Accessor::number_t;
    const int64_t here = l.out.place(at.image, at.h, at.w);
    const number_t pick = at.load(l.pick, here);
    number_t value(0);
    l.for_window(at, [&](int64_t h, int64_t w) {
      const number_t place(static_cast<double>(h * l.in.width + w));
      value =
          Math<number_t>::if_equal(pick, place, at.load(source, l.in.place(at.image, h, w)), value);
    });
    at.store(target, here, value);
  }
};

template <typename storage_t>
struct MeanOfWindow {
  PoolArrays<storage_t> l;
  Array<storage_t> source, target;

  template <typename Accessor>
  FASTMETA_HOST_DEVICE void operator()(const Accessor& at) const {
    using number_t = typename Accessor::number_t;
    number_t sum(0);
    l.for_window(
        at, [&](int64_t h, int64_t w) { sum = sum + at.load(source, l.in.place(at.image, h, w)); });
    at.store(target, l.out.place(at.image, at.h, at.w), sum * number_t(l.share(at.h, at.w)));
  }
};

// Computes target (+)= the sum that reaches an input's place from the outputs' source.
template <typename storage_t>
struct PoolScatter {
  PoolArrays<storage_t> l;
  Array<storage_t> source, target;
  bool adds;

  template <typename Accessor>
  FASTMETA_HOST_DEVICE void operator()(const Accessor& at) const {
    using number_t = typename Accessor::number_t;
    const int64_t here = l.in.place(at.image, at.h, at.w);
    const number_t place(static_cast<double>(at.h * l.in.width + at.w));
    number_t sum = adds ? at.load(target, here) : number_t(0);
    l.for_windows_at(at, [&](int64_t h, int64_t w) {
      const int64_t window = l.out.place(at.image, h, w);
      const number_t value = at.load(source, window);
      sum = sum +
            (l.pick ? Math<number_t>::if_equal(at.load(l.pick, window), place, value, number_t(0))
                    : value * number_t(l.share(h, w)));
    });
    at.store(target, here, sum);
  }
};

template <typename storage_t>
struct PoolLayer {
  const Network<storage_t>& net;
  const Instruction& i;

  template <typename Executor>
  FASTMETA_HOST_DEVICE void forward(Executor& exec) const {
    const auto l = arrays();
    if (l.pick) {
      exec.table(l.out, MaxPoolForward<storage_t>{l, net.value(i.x), net.value(i.y)});
    } else {
      exec.table(l.out, MeanOfWindow<storage_t>{l, net.value(i.x), net.value(i.y)});
    }
  }

  template <typename Executor>
  FASTMETA_HOST_DEVICE void tangent_forward(Executor& exec) const {
    const auto l = arrays();
    if (l.pick) {
      exec.table(l.out, MaxPoolGather<storage_t>{l, net.value_dot(i.x), net.value_dot(i.y)});
    } else {
      exec.table(l.out, MeanOfWindow<storage_t>{l, net.value_dot(i.x), net.value_dot(i.y)});
    }
  }

  // Backward pass of dy, or of its tangent.
  template <typename Executor>
  FASTMETA_HOST_DEVICE void backward(Executor& exec, Array<storage_t> dy,
                                     Array<storage_t> dx) const {
    const auto l = arrays();
    if (dx) exec.table(l.in, PoolScatter<storage_t>{l, dy, dx, i.adds_to_x});
  }

 private:
  FASTMETA_HOST_DEVICE PoolArrays<storage_t> arrays() const {
    const PoolShape& p = i.pool;
    const int64_t count = net.examples.count;
    PoolArrays<storage_t> l{p,
                            {count, p.height, p.width, p.channels},
                            {count, p.out_height(), p.out_width(), p.channels},
                            {}};
    if (p.kind == PoolKind::kMax) l.pick = net.extra(i.y);
    return l;
  }
};

}  // namespace fastmeta
