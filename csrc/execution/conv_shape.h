// Convolution of images with weights, for each task its own. One trilinear form ties z, x and w:
// the sum over examples b, positions p of z, taps t, channels c and outputs o of
//
//   z[b, p, o] x[b, at(p, t), c] w[o, c, t]      at(p, t) = p stride - padding + t dilation
//
// where at(p, t) lies within the image. Its derivatives are the three maps: the outputs z from x
// and w, the gradient of the inputs from dz and w, the gradient of the weights from dz and x. Each
// is linear in both arguments, and its derivatives are again among the three.
//
// Images are channels-last, [B, H, W, C] and [B, H', W', O]; weights [O, C / groups, kh, kw] as in
// PyTorch. groups are 1, or C (depthwise): then output o reads channel o / (O / C).
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace fastmeta {

struct ConvShape {
  int64_t channels, outputs, height, width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  int64_t groups;

  FASTMETA_HOST_DEVICE int64_t out_height() const {
    return (height + 2 * padding_h - dilation_h * (kernel_h - 1) - 1) / stride_h + 1;
  }
  FASTMETA_HOST_DEVICE int64_t out_width() const {
    return (width + 2 * padding_w - dilation_w * (kernel_w - 1) - 1) / stride_w + 1;
  }
  FASTMETA_HOST_DEVICE int64_t taps() const { return kernel_h * kernel_w; }
  FASTMETA_HOST_DEVICE int64_t in_positions() const { return height * width; }
  FASTMETA_HOST_DEVICE int64_t out_positions() const { return out_height() * out_width(); }
  FASTMETA_HOST_DEVICE bool is_depthwise() const { return groups > 1; }
  // Whether an output takes so few multiplications that computing it again beats reading it from
  // memory.
  FASTMETA_HOST_DEVICE bool is_recompute_cheap() const {
    return !is_depthwise() && channels * taps() <= 32;
  }
  FASTMETA_HOST_DEVICE int64_t weight_size() const {
    return outputs * (channels / groups) * taps();
  }
};

enum class MapTo {
  kOutput,  // z from x and w
  kInput,   // dx from dz and w
  kWeight,  // dw from dz and x
};

}  // namespace fastmeta
