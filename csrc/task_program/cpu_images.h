// Steps over channels-last images on the CPU: vectors run along the channels of a position.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>

#include <algorithm>
#include <type_traits>

#include "task_program/executor.h"

namespace fastmeta {

// Channels of a position that one vector holds, or the rest of them.
template <typename value_t, bool whole>
struct ImageCell {
  using number_t = at::vec::Vectorized<value_t>;
  int64_t image, h, w, channel;
  int count;

  number_t load(const Array<value_t>& a, int64_t begin) const {
    const value_t* source = a.data + begin + channel;
    return whole ? number_t::loadu(source) : number_t::loadu(source, count);
  }
  void store(const Array<value_t>& a, int64_t begin, const number_t& value) const {
    if constexpr (whole) {
      value.store(a.data + begin + channel);
    } else {
      value.store(a.data + begin + channel, count);
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
    const int64_t row_numbers = images_.width * images_.channels;
    in_parts(images_.count * images_.height, kGrain / row_numbers, [&](int64_t row) {
      for (int64_t w = 0; w < images_.width; ++w) {
        for_channels([&](auto whole, int64_t channel, int count) {
          f(cell<decltype(whole)::value>(row, w, channel, count));
        });
      }
    });
  }

  // A row's sums are added up before they join the others.
  template <typename F>
  void column_sums(bool whole_batch, const F& f, value_t* target) const {
    const int64_t sets = whole_batch ? 1 : images_.count;
    const int64_t rows = images_.count * images_.height / sets;
    for_sets(sets, [&](int64_t set, auto whole, int64_t channel, int count) {
      Vec first(value_t(0)), second(value_t(0));
      for (int64_t row = set * rows; row < (set + 1) * rows; ++row) {
        Vec row_first(value_t(0)), row_second(value_t(0));
        for (int64_t w = 0; w < images_.width; ++w) {
          const auto two = f(cell<decltype(whole)::value>(row, w, channel, count));
          row_first = row_first + two.first;
          row_second = row_second + two.second;
        }
        first = first + row_first;
        second = second + row_second;
      }
      value_t* place = target + set * 4 * images_.channels + channel;
      first.store(place, count);
      second.store(place + images_.channels, count);
    });
  }

  // In runs that stay in the L1 cache, so that the squares are of distances from a run's own mean;
  // runs join as Chan 1979 has it.
  void column_moments(bool whole_batch, const value_t* x, value_t* target) const {
    constexpr int64_t kRun = 64;
    const int64_t sets = whole_batch ? 1 : images_.count;
    const int64_t positions = images_.positions() / sets, channels = images_.channels;
    for_sets(sets, [&](int64_t set, auto whole, int64_t channel, int count) {
      Vec mean(value_t(0)), squares(value_t(0));
      for (int64_t begin = 0; begin < positions; begin += kRun) {
        const int64_t n = std::min(kRun, positions - begin);
        const value_t* run = x + (set * positions + begin) * channels + channel;
        const auto load = [&](int64_t i) {
          return decltype(whole)::value ? Vec::loadu(run + i * channels)
                                        : Vec::loadu(run + i * channels, count);
        };
        Vec run_mean(value_t(0)), run_squares(value_t(0));
        for (int64_t i = 0; i < n; ++i) run_mean = run_mean + load(i);
        run_mean = run_mean * Vec(value_t(1) / static_cast<value_t>(n));
        for (int64_t i = 0; i < n; ++i) {
          const Vec distance = load(i) - run_mean;
          run_squares = at::vec::fmadd(distance, distance, run_squares);
        }
        const auto share = static_cast<value_t>(n) / static_cast<value_t>(begin + n);
        const Vec step = run_mean - mean;
        mean = at::vec::fmadd(step, Vec(share), mean);
        squares = squares + run_squares + step * step * Vec(share * static_cast<value_t>(begin));
      }
      value_t* place = target + set * 4 * channels + channel;
      mean.store(place, count);
      squares.store(place + channels, count);
    });
  }

 private:
  using Vec = at::vec::Vectorized<value_t>;
  static constexpr int kWidth = Vec::size();
  static constexpr int64_t kGrain = 32768;

  template <bool whole>
  ImageCell<value_t, whole> cell(int64_t row, int64_t w, int64_t channel, int count) const {
    return {row / images_.height, row % images_.height, w, channel, count};
  }

  // body(whole, first channel, how many)
  template <typename Body>
  void for_channels(const Body& body) const {
    int64_t channel = 0;
    for (; channel + kWidth <= images_.channels; channel += kWidth) {
      body(std::true_type{}, channel, kWidth);
    }
    if (channel < images_.channels) {
      body(std::false_type{}, channel, static_cast<int>(images_.channels - channel));
    }
  }

  // body(set, whole, first channel, how many): sets, or vectors of channels, share the threads.
  template <typename Body>
  void for_sets(int64_t sets, const Body& body) const {
    const int64_t vectors = (images_.channels + kWidth - 1) / kWidth;
    in_parts(sets * vectors, 1, [&](int64_t part) {
      const int64_t channel = part % vectors * kWidth;
      if (channel + kWidth <= images_.channels) {
        body(part / vectors, std::true_type{}, channel, kWidth);
      } else {
        body(part / vectors, std::false_type{}, channel,
             static_cast<int>(images_.channels - channel));
      }
    });
  }

  template <typename Body>
  void in_parts(int64_t n, int64_t grain, const Body& body) const {
    const auto part = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(i);
    };
    if (shares_threads_) {
      at::parallel_for(0, n, std::max<int64_t>(1, grain), part);
    } else {
      part(0, n);
    }
  }

  const Images images_;
  bool shares_threads_;
};

}  // namespace fastmeta
