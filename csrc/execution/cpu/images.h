// Steps over channels-last images on the CPU: vectors run along the channels of a position.
#pragma once

#include <ATen/cpu/vec/functional.h>

#include <algorithm>
#include <type_traits>

#include "common/ceil_div.h"
#include "common/cpu/parallel.h"
#include "execution/executor.h"

namespace fastmeta {

// Channels of a position in one vector: a whole one, or the rest.
template <typename value_t, bool whole>
struct ImageAccessor {
  using number_t = at::vec::Vectorized<value_t>;
  int64_t image, h, w, channel;
  int count;

  number_t load(const Array<value_t>& a, int64_t begin) const {
    return load(a.data + begin + channel);
  }
  void store(const Array<value_t>& a, int64_t begin, const number_t& value) const {
    store(a.data + begin + channel, value);
  }

  number_t load(const value_t* source) const {
    return whole ? number_t::loadu(source) : number_t::loadu(source, count);
  }
  void store(value_t* target, const number_t& value) const {
    if constexpr (whole) {
      value.store(target);
    } else {
      value.store(target, count);
    }
  }
};

template <typename value_t>
class CpuImages {
 public:
  CpuImages(const Images& images, bool shares_threads)
      : images_(images), shares_threads_(shares_threads) {}

  template <typename F>
  void table(const F& f) const {
    const int64_t grain = kGrain / (images_.width * images_.channels);
    in_parts(images_.count * images_.height, grain, [&](int64_t line) { table_line(line, f); });
  }

  // Calls f on lines [first, last) of all images.
  template <typename F>
  void table_of_lines(int64_t first, int64_t last, const F& f) const {
    for (int64_t line = first; line < last; ++line) table_line(line, f);
  }

  template <typename F>
  void column_sums(bool whole_batch, const F& f, value_t* target) const {
    const int64_t sets = whole_batch ? 1 : images_.count;
    const int64_t lines = images_.count * images_.height / sets;
    for_sets(sets, [&](int64_t set, int64_t begin, int64_t end) {
      value_t* sums = target + set * 4 * images_.channels;
      for (int64_t line = set * lines; line < (set + 1) * lines; ++line) {
        join_line(line, begin, end, f, line > set * lines, sums);
      }
    });
  }

  // Adds lines [first, last) to the sums of the lines from `begin` on.
  template <typename F>
  void join_sums(int64_t begin, int64_t first, int64_t last, const F& f, value_t* sums) const {
    for (int64_t line = first; line < last; ++line) {
      join_line(line, 0, images_.channels, f, line > begin, sums);
    }
  }

  // Computes moments in runs that stay in the L1 cache, so that squares are of distances from a
  // run's own mean. Runs merge by Chan, Golub and LeVeque (1979).
  void column_moments(bool whole_batch, const value_t* x, value_t* target) const {
    const int64_t sets = whole_batch ? 1 : images_.count;
    const int64_t positions = images_.positions() / sets, channels = images_.channels;
    for_sets(sets, [&](int64_t set, int64_t begin, int64_t end) {
      value_t* moments = target + set * 4 * channels;
      join_runs(x + set * positions * channels, 0, positions, begin, end, moments);
    });
  }

  // Merges positions [first, last) of x into the moments of the positions before them.
  void join_moments(const value_t* x, int64_t first, int64_t last, value_t* moments) const {
    join_runs(x, first, last, 0, images_.channels, moments);
  }

  // Merges the moments of n positions into the moments of `before` others.
  void merge_moments(int64_t before, int64_t n, const value_t* other, value_t* moments) const {
    for_channels(0, images_.channels, ImageAccessor<value_t, true>{0, 0, 0, 0, kWidth},
                 [&](const auto& element) {
                   const value_t* mean = other + element.channel;
                   merge(element, before, n, element.load(mean),
                         element.load(mean + images_.channels), moments);
                 });
  }

 private:
  using Vec = at::vec::Vectorized<value_t>;
  static constexpr int kWidth = Vec::size();
  static constexpr int64_t kGrain = 32768, kRun = 64;

  template <typename F>
  void table_line(int64_t line, const F& f) const {
    ImageAccessor<value_t, true> at{line / images_.height, line % images_.height, 0, 0, kWidth};
    for (; at.w < images_.width; ++at.w) {
      for_channels(0, images_.channels, at, [&](const auto& element) { f(element); });
    }
  }

  // Adds up a line's sums before they join the others.
  template <typename F>
  void join_line(int64_t line, int64_t begin, int64_t end, const F& f, bool adds,
                 value_t* sums) const {
    const ImageAccessor<value_t, true> at{line / images_.height, line % images_.height, 0, 0,
                                          kWidth};
    for_channels(begin, end, at, [&](auto element) {
      const Two<Vec> sum = sum_of<Two<Vec>>(images_.width, [&](int64_t w) {
        element.w = w;
        return f(element);
      });
      value_t *first = sums + element.channel, *second = first + images_.channels;
      element.store(first, adds ? element.load(first) + sum.first : sum.first);
      element.store(second, adds ? element.load(second) + sum.second : sum.second);
    });
  }

  // Sums n numbers in four chains: in one chain each addition would wait for the one before.
  template <typename Number, typename Get>
  static Number sum_of(int64_t n, const Get& get) {
    Number sums[4] = {};
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) {
      for (int j = 0; j < 4; ++j) sums[j] = sums[j] + get(i + j);
    }
    for (; i < n; ++i) sums[0] = sums[0] + get(i);
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }

  void join_runs(const value_t* x, int64_t first, int64_t last, int64_t begin, int64_t end,
                 value_t* moments) const {
    for (; first < last; first += kRun) {
      const int64_t n = std::min(kRun, last - first);
      const value_t* run = x + first * images_.channels;
      for_channels(begin, end, ImageAccessor<value_t, true>{0, 0, 0, 0, kWidth},
                   [&](const auto& element) { join_run(element, run, n, first, moments); });
    }
  }

  // Merges the n positions of a run into the moments of `before` positions.
  template <typename Accessor>
  void join_run(const Accessor& element, const value_t* run, int64_t n, int64_t before,
                value_t* moments) const {
    const auto load = [&](int64_t i) {
      return element.load(run + i * images_.channels + element.channel);
    };
    const Vec mean = sum_of<Vec>(n, load) * Vec(value_t(1) / static_cast<value_t>(n));
    const Vec squares = sum_of<Vec>(n, [&](int64_t i) {
      const Vec distance = load(i) - mean;
      return distance * distance;
    });
    merge(element, before, n, mean, squares, moments);
  }

  template <typename Accessor>
  void merge(const Accessor& element, int64_t before, int64_t n, Vec mean, Vec squares,
             value_t* moments) const {
    value_t *all_mean = moments + element.channel, *all_squares = all_mean + images_.channels;
    if (before > 0) {
      const auto share = static_cast<value_t>(n) / static_cast<value_t>(before + n);
      const Vec old = element.load(all_mean), step = mean - old;
      squares = squares + element.load(all_squares) +
                step * step * Vec(share * static_cast<value_t>(before));
      mean = at::vec::fmadd(step, Vec(share), old);
    }
    element.store(all_mean, mean);
    element.store(all_squares, squares);
  }

  // Calls body(accessor) for the channels from begin to end of the position of `at`.
  template <typename Body>
  void for_channels(int64_t begin, int64_t end, ImageAccessor<value_t, true> at,
                    const Body& body) const {
    for (at.channel = begin; at.channel + kWidth <= end; at.channel += kWidth) body(at);
    if (at.channel < end) {
      const int rest = static_cast<int>(end - at.channel);
      body(ImageAccessor<value_t, false>{at.image, at.h, at.w, at.channel, rest});
    }
  }

  // Calls body(set, first channel, end). Threads share the sets, or the channels of a single set.
  template <typename Body>
  void for_sets(int64_t sets, const Body& body) const {
    const int64_t parts =
        sets > 1 || !shares_threads_ ? 1 : ceil_div(images_.channels, int64_t(kWidth));
    in_parts(sets * parts, 1, [&](int64_t part) {
      const int64_t begin = part % parts * kWidth;
      body(part / parts, begin,
           parts == 1 ? images_.channels : std::min(images_.channels, begin + kWidth));
    });
  }

  template <typename Body>
  void in_parts(int64_t n, int64_t grain, const Body& body) const {
    const auto part = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(i);
    };
    if (shares_threads_) {
      parallel_for(0, n, std::max<int64_t>(1, grain), part);
    } else {
      part(0, n);
    }
  }

  const Images images_;
  bool shares_threads_;
};

}  // namespace fastmeta
