// Patches of channels-last images as a matrix, the kernel's view of its input: a row an output
// position of an example, in order over all examples; a column a (tap, channel).
#pragma once

#include <ATen/cpu/vec/functional.h>

#include <algorithm>
#include <cstdint>

#include "common/ceil_div.h"
#include "common/cpu/gemm.h"
#include "common/cpu/transpose.h"
#include "execution/conv_shape.h"

namespace fastmeta {

struct Interval {
  int64_t begin, end;

  int64_t size() const { return end - begin; }
};

// One direction of an image: tap t at output position p reads the pixel p stride - padding + t
// dilation.
struct ImageAxis {
  int64_t size, positions, taps, stride, padding, dilation;

  int64_t pixel(int64_t position, int64_t tap) const {
    return position * stride - padding + tap * dilation;
  }
  bool contains(int64_t pixel) const { return pixel >= 0 && pixel < size; }
  Interval taps_inside(int64_t position) const {
    const int64_t first = pixel(position, 0);
    if (first >= 0 && pixel(position, taps - 1) < size) return {0, taps};
    return inside(first, dilation, taps);
  }
  Interval positions_inside(int64_t tap) const { return inside(pixel(0, tap), stride, positions); }

 private:
  // Interval of the n in [0, count) with 0 <= first + n step < size.
  Interval inside(int64_t first, int64_t step, int64_t count) const {
    const int64_t end = std::min(count, ceil_div(std::max<int64_t>(0, size - first), step));
    return {std::min(end, ceil_div(std::max<int64_t>(0, -first), step)), end};
  }
};

struct ImageAxes {
  ImageAxis vertical, horizontal;

  explicit ImageAxes(const ConvShape& s)
      : vertical{s.height, s.out_height(), s.kernel_h, s.stride_h, s.padding_h, s.dilation_h},
        horizontal{s.width, s.out_width(), s.kernel_w, s.stride_w, s.padding_w, s.dilation_w} {}

  int64_t positions() const { return vertical.positions * horizontal.positions; }

  // Calls body(row, example, y, xs) for the lines, or parts of lines, that the rows make up; `row`
  // is the row of the first x.
  template <typename Body>
  void for_each_line(const Interval& rows, const Body& body) const {
    const int64_t width = horizontal.positions;
    for (int64_t row = rows.begin; row < rows.end;) {
      const int64_t x = row % width, y = row / width % vertical.positions;
      const int64_t end = std::min(width, x + rows.end - row);
      body(row, row / positions(), y, Interval{x, end});
      row += end - x;
    }
  }

  template <typename Body>
  void for_each_position(const Interval& rows, const Body& body) const {
    for_each_line(rows, [&](int64_t row, int64_t example, int64_t y, const Interval& xs) {
      for (int64_t x = xs.begin; x < xs.end; ++x) body(row + x - xs.begin, example, y, x);
    });
  }
};

template <typename value_t>
class CpuPatches {
 public:
  explicit CpuPatches(const ConvShape& shape)
      : axes_(shape),
        channels_(shape.channels),
        columns_(shape.taps() * shape.channels),
        // For one tap and stride 1 the images are the matrix.
        is_image_(shape.taps() == 1 && shape.stride_h == 1 && shape.stride_w == 1 &&
                  shape.padding_h == 0 && shape.padding_w == 0),
        // With few channels, runs along channels are short; lines of one channel are longer.
        is_planar_(!is_image_ && channels_ <= kFewChannels) {}

  bool is_image() const { return is_image_; }
  // Whether a column is a (channel, tap), and gather() gives the transposed matrix.
  bool is_planar() const { return is_planar_; }
  int64_t columns() const { return columns_; }

  // Rows of a block: as many as stay in the L2 cache, with all their columns.
  int64_t block() const {
    const int64_t rows = kBlockBytes / (columns_ * static_cast<int64_t>(sizeof(value_t)));
    return std::clamp<int64_t>(rows / 16 * 16, kLeastRows, kMostRows);
  }
  int64_t scratch() const {
    if (is_image_) return 0;
    const int64_t planes = is_planar_ && channels_ > 1 ? pixels() * channels_ : 0;
    return block() * columns_ + planes;
  }

  // Gathers at most a block of rows; pixels beyond the border are 0.
  Operand<value_t> gather(const value_t* x, const Interval& rows, value_t* scratch) const {
    if (is_image_) return {x + rows.begin * channels_, channels_};
    if (is_planar_) {
      gather_planes(x, rows, scratch, scratch + block() * columns_);
      return {scratch, rows.size(), true};
    }
    const auto copy = [&](int64_t target, int64_t source, int64_t count) {
      std::copy_n(x + source, count, scratch + target);
    };
    const auto pad = [&](int64_t target, int64_t count) {
      std::fill_n(scratch + target, count, value_t(0));
    };
    for_each_run(rows, copy, pad);
    return {scratch, columns_};
  }

  // Adds a matrix [rows, columns] to the images, the transpose of gather().
  void scatter_add(const value_t* matrix, const Interval& rows, value_t* x) const {
    using Vec = at::vec::Vectorized<value_t>;
    const auto add = [&](int64_t source, int64_t target, int64_t count) {
      at::vec::map2<value_t>([](Vec a, Vec b) { return a + b; }, x + target, x + target,
                             matrix + source, count);
    };
    for_each_run(rows, add, [](int64_t, int64_t) {});
  }

 private:
  static constexpr int64_t kFewChannels = 4, kBlockBytes = 512 << 10;
  // With fewer rows at a time the BLAS mostly reads weights, at half its speed with 256 channels.
  static constexpr int64_t kLeastRows = 128, kMostRows = 1024;

  int64_t pixels() const { return axes_.vertical.size * axes_.horizontal.size; }

  // Calls inside(offset in the matrix, in the images, count) for each run that is contiguous in
  // both, and outside(offset in the matrix, count) for each run beyond the border.
  template <typename Inside, typename Outside>
  void for_each_run(const Interval& rows, const Inside& inside, const Outside& outside) const {
    const ImageAxis &vertical = axes_.vertical, &horizontal = axes_.horizontal;
    const int64_t line_columns = horizontal.taps * channels_;
    axes_.for_each_position(rows, [&](int64_t row, int64_t example, int64_t y, int64_t x) {
      const Interval taps = horizontal.taps_inside(x);
      for (int64_t i = 0; i < vertical.taps; ++i) {
        const int64_t place = (row - rows.begin) * columns_ + i * line_columns;
        const int64_t line = vertical.pixel(y, i);
        if (!vertical.contains(line) || taps.size() == 0) {
          outside(place, line_columns);
          continue;
        }
        outside(place, taps.begin * channels_);
        const int64_t first = (example * vertical.size + line) * horizontal.size;
        const int64_t joined = horizontal.dilation == 1 ? taps.size() : 1;
        for (int64_t j = taps.begin; j < taps.end; j += joined) {
          inside(place + j * channels_, (first + horizontal.pixel(x, j)) * channels_,
                 joined * channels_);
        }
        outside(place + taps.end * channels_, (horizontal.taps - taps.end) * channels_);
      }
    });
  }

  // Gathers the transposed matrix, [columns, rows]. If there are several channels, the lines that
  // are read are transposed to planes first.
  void gather_planes(const value_t* x, const Interval& rows, value_t* matrix,
                     value_t* planes) const {
    const int64_t positions = axes_.positions();
    for (int64_t begin = rows.begin; begin < rows.end;) {
      const int64_t example = begin / positions;
      const Interval part{begin, std::min(rows.end, (example + 1) * positions)};
      const value_t* image = x + example * pixels() * channels_;
      if (channels_ > 1) {
        const Interval lines = lines_of(part);
        const int64_t width = axes_.horizontal.size;
        transpose(lines.size() * width, channels_, image + lines.begin * width * channels_,
                  channels_, planes + lines.begin * width, pixels());
        image = planes;
      }
      for (int64_t column = 0; column < columns_; ++column) {
        const int64_t taps = columns_ / channels_;
        copy_plane(image + column / taps * pixels(), column % taps, part,
                   matrix + column * rows.size() + begin - rows.begin);
      }
      begin = part.end;
    }
  }

  // Lines of an image that its rows read.
  Interval lines_of(const Interval& rows) const {
    const ImageAxis& vertical = axes_.vertical;
    const int64_t width = axes_.horizontal.positions;
    const int64_t first = rows.begin / width % vertical.positions;
    const int64_t last = (rows.end - 1) / width % vertical.positions;
    const int64_t begin = std::clamp<int64_t>(vertical.pixel(first, 0), 0, vertical.size);
    return {begin, std::clamp(vertical.pixel(last, vertical.taps - 1) + 1, begin, vertical.size)};
  }

  // Copies the pixels that a tap reads of one channel of one image, at the rows.
  void copy_plane(const value_t* plane, int64_t tap, const Interval& rows, value_t* target) const {
    const ImageAxis &vertical = axes_.vertical, &horizontal = axes_.horizontal;
    const int64_t i = tap / horizontal.taps, j = tap % horizontal.taps;
    const Interval valid = horizontal.positions_inside(j);
    axes_.for_each_line(rows, [&](int64_t row, int64_t, int64_t y, const Interval& xs) {
      value_t* out = target + row - rows.begin - xs.begin;
      const int64_t line = vertical.pixel(y, i);
      const bool is_inside = vertical.contains(line);
      const int64_t begin = is_inside ? std::clamp(valid.begin, xs.begin, xs.end) : xs.end;
      const int64_t end = std::clamp(valid.end, begin, xs.end);
      std::fill(out + xs.begin, out + begin, value_t(0));
      std::fill(out + end, out + xs.end, value_t(0));
      const value_t* source = plane + line * horizontal.size;
      if (horizontal.stride == 1) {
        std::copy_n(source + horizontal.pixel(begin, j), end - begin, out + begin);
      } else {
        for (int64_t p = begin; p < end; ++p) out[p] = source[horizontal.pixel(p, j)];
      }
    });
  }

  ImageAxes axes_;
  int64_t channels_, columns_;
  bool is_image_, is_planar_;
};

}  // namespace fastmeta
