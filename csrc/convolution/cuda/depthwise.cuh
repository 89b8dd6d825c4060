// Depthwise convolutions, groups C: output o reads only channel o / (O / C). A thread sums an
// element of C in a register: a tile could share nothing but the taps' numbers.
#pragma once

#include "execution/conv_shape.h"
#include "execution/cuda/grid_accessors.cuh"
#include "execution/elementwise.h"

namespace fastmeta {

// Computes z and dx of all pairs, then finish; an accessor is an element.
template <typename value_t, typename Finish>
struct DepthwiseImage {
  using number_t = acc_t<value_t>;
  Convolution<value_t> c;
  int64_t out_height, out_width;
  Finish finish;

  __device__ void operator()(const GlobalAccessor<value_t>& at) const {
    const ConvShape& s = c.shape;
    const bool to_z = c.to == MapTo::kOutput;
    const int64_t channels = to_z ? s.outputs : s.channels, channel = at.index % channels;
    const int64_t width = to_z ? out_width : s.width, height = to_z ? out_height : s.height;
    const int64_t position = at.index / channels, line = position / width;
    const int64_t w = position % width, h = line % height, image = line / height;
    number_t sum = to_z && c.bias ? at.load_one(c.bias, channel) : 0;
    for (int64_t tap = 0; tap < s.taps(); ++tap) {
      sum += to_z ? of_z(at, image, h, w, channel, tap) : of_dx(at, image, h, w, channel, tap);
    }
    store_sum(at, c.c, c.into, sum);
    finish(at);
  }

 private:
  // Product that a tap adds to z.
  __device__ number_t of_z(const GlobalAccessor<value_t>& at, int64_t image, int64_t h, int64_t w,
                           int64_t output, int64_t tap) const {
    const ConvShape& s = c.shape;
    const int64_t y = h * s.stride_h - s.padding_h + tap / s.kernel_w * s.dilation_h;
    const int64_t x = w * s.stride_w - s.padding_w + tap % s.kernel_w * s.dilation_w;
    if (y < 0 || y >= s.height || x < 0 || x >= s.width) return 0;
    const int64_t channel = output / (s.outputs / s.channels);
    const int64_t place = ((image * s.height + y) * s.width + x) * s.channels + channel;
    number_t sum = 0;
    for (int pair = 0; pair < c.pairs; ++pair) {
      sum += at.load_one(c.a[pair], place) * at.load_one(c.b[pair], output * s.taps() + tap);
    }
    return sum;
  }

  // Product that a tap adds to dx.
  __device__ number_t of_dx(const GlobalAccessor<value_t>& at, int64_t image, int64_t h, int64_t w,
                            int64_t channel, int64_t tap) const {
    const ConvShape& s = c.shape;
    const int64_t y = h + s.padding_h - tap / s.kernel_w * s.dilation_h;
    const int64_t x = w + s.padding_w - tap % s.kernel_w * s.dilation_w;
    if (y < 0 || y % s.stride_h != 0 || y / s.stride_h >= out_height) return 0;
    if (x < 0 || x % s.stride_w != 0 || x / s.stride_w >= out_width) return 0;
    const int64_t position = (image * out_height + y / s.stride_h) * out_width + x / s.stride_w;
    const int64_t of_channel = s.outputs / s.channels;
    number_t sum = 0;
    for (int pair = 0; pair < c.pairs; ++pair) {
      for (int64_t o = channel * of_channel; o < (channel + 1) * of_channel; ++o) {
        sum += at.load_one(c.a[pair], position * s.outputs + o) *
               at.load_one(c.b[pair], o * s.taps() + tap);
      }
    }
    return sum;
  }
};

// Computes an element of dw, then finish; a row is an element, whose thread group shares the
// positions.
template <typename value_t, typename Finish>
struct DepthwiseWeight {
  Convolution<value_t> c;
  int64_t out_height, out_width;
  Finish finish;

  __device__ void operator()(const GlobalThreadGroup<value_t>& group, int64_t element) const {
    const ConvShape& s = c.shape;
    const int64_t tap = element % s.taps(), output = element / s.taps();
    const int64_t channel = output / (s.outputs / s.channels);
    acc_t<value_t> sum = 0;
    for (int64_t z = group.lane; z < c.examples * out_height * out_width; z += group.size) {
      const int64_t line = z / out_width, image = line / out_height;
      const int64_t y =
          line % out_height * s.stride_h - s.padding_h + tap / s.kernel_w * s.dilation_h;
      const int64_t x = z % out_width * s.stride_w - s.padding_w + tap % s.kernel_w * s.dilation_w;
      if (y < 0 || y >= s.height || x < 0 || x >= s.width) continue;
      const int64_t place = ((image * s.height + y) * s.width + x) * s.channels + channel;
      for (int pair = 0; pair < c.pairs; ++pair) {
        sum += group.load(c.a[pair], z * s.outputs + output) * group.load(c.b[pair], place);
      }
    }
    sum = group.sum(sum);
    if (group.lane != 0) return;
    const GlobalAccessor<value_t> at{group.task, element};
    store_sum(at, c.c, c.into, sum);
    finish(at);
  }
};

}  // namespace fastmeta
