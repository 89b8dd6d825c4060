// Maps as the CPU kernels of pair_pool read them: a plane for each pixel of a window, in which a lane of
// a vector is a window. So windows of any size fill the vectors, and take no gathers.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>

#include "common/ceil_div.h"
#include "common/cpu/parallel.h"
#include "common/cpu/widen.h"
#include "pair_pool/pair_pool.h"

namespace fastmeta {

// Planes [maps, taps, width] of maps [maps, C, H, W]; width is the windows in whole vectors.
template <typename scalar_t>
class Planes {
  using value_t = acc_t<scalar_t>;
  static constexpr int64_t kSize = at::vec::Vectorized<value_t>::size();

 public:
  Planes(const PairPoolShape& shape, int64_t maps)
      : shape_(shape),
        maps_(maps),
        width_(ceil_div(shape.windows(), kSize) * kSize),
        data_(maps * shape.taps() * width_) {}

  int64_t width() const { return width_; }
  value_t* map(int64_t m) { return &data_[m * shape_.taps() * width_]; }
  const value_t* map(int64_t m) const { return &data_[m * shape_.taps() * width_]; }

  void clear() { std::fill_n(data_.data(), maps_ * shape_.taps() * width_, value_t(0)); }

  void read(const scalar_t* maps) {
    for_each_map([&](int64_t m) {
      const scalar_t* source = maps + m * shape_.numbers();
      for_each_number(
          m, [&](int64_t pixel, value_t& number) { number = static_cast<value_t>(source[pixel]); });
      for (int64_t tap = 0; tap < shape_.taps(); ++tap) {
        value_t* plane = map(m) + tap * width_;
        std::fill(plane + shape_.windows(), plane + width_, value_t(0));
      }
    });
  }

  // Writes the maps, with zeros outside of the windows.
  void write(scalar_t* maps) {
    for_each_map([&](int64_t m) {
      scalar_t* target = maps + m * shape_.numbers();
      std::fill_n(target, shape_.numbers(), scalar_t(0));
      for_each_number(m, [&](int64_t pixel, value_t& number) {
        target[pixel] = static_cast<scalar_t>(number);
      });
    });
  }

 private:
  template <typename Body>
  void for_each_map(const Body& body) const {
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, shape_.numbers()));
    parallel_for(0, maps_, grain, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) body(m);
    });
  }

  // Calls body(pixel, number in its plane) for the pixels of a map, in the order of the planes.
  template <typename Body>
  void for_each_number(int64_t m, const Body& body) {
    const int64_t rows = shape_.channels * shape_.rows(), columns = shape_.columns();
    for (int64_t tap = 0; tap < shape_.taps(); ++tap) {
      value_t* plane = map(m) + tap * width_;
      for (int64_t row = 0; row < rows; ++row) {
        const int64_t pixel = shape_.pixel(row * columns, tap);
        for (int64_t j = 0; j < columns; ++j) {
          body(pixel + j * shape_.pool, plane[row * columns + j]);
        }
      }
    }
  }

  const PairPoolShape shape_;
  int64_t maps_, width_;
  Buffer<value_t> data_;
};

}  // namespace fastmeta
