// Operands of a norm's steps: its arrays, the statistics of its sets, and a view of one
// accessor; formulas in norm.h.
#pragma once

#include "execution/executor.h"
#include "execution/math.h"

namespace fastmeta {

// Steps fused behind the norm. picks: a max pool, which stores the picked place of each window (-1
// if ReLU is not active) and x there.
template <bool has_relu, bool picks>
struct NormForm {
  static constexpr bool kRelu = has_relu, kPicks = picks;
};

template <typename storage_t>
struct NormArrays {
  Images in, out;
  bool whole_batch;
  int64_t of_group;  // channels of a group
  double eps;
  bool adds_to_x;
  Array<storage_t> x, y, statistics, pick, picked, weight, bias, dy, sums, dx;
  Array<storage_t> x_dot, y_dot, statistics_dot, weight_dot, bias_dot, dy_dot, sums_dot, dx_dot;

  FASTMETA_HOST_DEVICE int64_t sets() const { return whole_batch ? 1 : in.count; }
  FASTMETA_HOST_DEVICE int64_t set_size() const { return in.positions() / sets() * of_group; }
};

// Computes mean and 1/s of the set's groups from the moments of their channels. A row is a set.
template <typename storage_t>
struct NormStatistics {
  NormArrays<storage_t> l;

  template <typename ThreadGroup>
  FASTMETA_HOST_DEVICE void operator()(const ThreadGroup& group, int64_t set) const {
    using number_t = typename ThreadGroup::number_t;
    const int64_t channels = l.in.channels, begin = set * 4 * channels;
    const number_t rows(static_cast<double>(l.set_size() / l.of_group));
    for (int64_t j = group.lane; j < channels; j += group.size) {
      const int64_t first = begin + j / l.of_group * l.of_group;
      number_t mean(0), squares(0);
      for (int64_t c = 0; c < l.of_group; ++c) mean = mean + group.load(l.statistics, first + c);
      mean = mean * number_t(1.0 / l.of_group);
      for (int64_t c = 0; c < l.of_group; ++c) {
        const number_t distance = group.load(l.statistics, first + c) - mean;
        squares =
            squares + group.load(l.statistics, first + channels + c) + rows * distance * distance;
      }
      const number_t variance = squares * number_t(1.0 / l.set_size());
      group.store(l.statistics, begin + 2 * channels + j, mean);
      group.store(l.statistics, begin + 3 * channels + j,
                  number_t(1) / Math<number_t>::sqrt(variance + number_t(l.eps)));
    }
  }
};

// Stores mean and 1/s of given statistics in NormStatistics' format; an accessor is a channel.
template <typename storage_t>
struct GivenStatistics {
  int64_t channels;
  double eps;
  Array<storage_t> mean, variance, statistics;

  template <typename Accessor>
  FASTMETA_HOST_DEVICE void operator()(const Accessor& at) const {
    using number_t = typename Accessor::number_t;
    at.store(statistics, at.load(mean), 2 * channels);
    at.store(statistics, number_t(1) / Math<number_t>::sqrt(at.load(variance) + number_t(eps)),
             3 * channels);
  }
};

// Computes both means of a set's groups from the sums of their channels, each times its weight.
// With tangents of weights, adds the other sums times these.
template <typename storage_t>
struct NormMeans {
  int64_t channels, of_group, set_size;
  Array<storage_t> sums, weight, other_sums, weight_dot;

  template <typename ThreadGroup>
  FASTMETA_HOST_DEVICE void operator()(const ThreadGroup& group, int64_t set) const {
    for (int64_t j = group.lane; j < 2 * channels; j += group.size) {
      const int64_t channel = j % channels, begin = channel / of_group * of_group;
      const int64_t first = set * 4 * channels + j - channel;
      typename ThreadGroup::number_t sum(0);
      for (int64_t c = begin; c < begin + of_group; ++c) {
        const auto one = group.load(sums, first + c);
        sum = sum + (weight ? one * group.load(weight, c) : one);
        if (weight_dot) sum = sum + group.load(other_sums, first + c) * group.load(weight_dot, c);
      }
      group.store(sums, first + 2 * channels + channel, sum * decltype(sum)(1.0 / set_size));
    }
  }
};

// View of an accessor: of the norm's input, or (of_output) of its output.
template <typename Form, bool of_output, typename storage_t, typename Accessor>
struct NormView {
  using number_t = typename Accessor::number_t;
  using M = Math<number_t>;
  const NormArrays<storage_t>& l;
  const Accessor& at;

  FASTMETA_HOST_DEVICE int64_t channels() const { return l.in.channels; }
  FASTMETA_HOST_DEVICE number_t of_channel(const Array<storage_t>& a) const {
    return at.load(a, 0);
  }
  // Number `which` of the 4 that a set keeps for each channel.
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
  // Offset in the input of place 0 .. 3 of a window.
  FASTMETA_HOST_DEVICE int64_t place(int k) const {
    return l.in.place(at.image, 2 * at.h + k / 2, 2 * at.w + k % 2);
  }
  FASTMETA_HOST_DEVICE number_t picked() const { return at.load(l.pick, here()); }

  // Value of x at the place that an output comes from.
  FASTMETA_HOST_DEVICE number_t source_x() const {
    static_assert(of_output);
    return at.load(Form::kPicks ? l.picked : l.x, here());
  }
  // Value of an array like x at the place that an output comes from.
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
  // Value, or zero if ReLU is not active at an output.
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
  // Gradient that reaches a place of the input from an array like dy.
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

template <typename Form, bool of_output, typename storage_t, typename Accessor>
FASTMETA_HOST_DEVICE NormView<Form, of_output, storage_t, Accessor> norm_view(
    const NormArrays<storage_t>& l, const Accessor& at) {
  return {l, at};
}

}  // namespace fastmeta
