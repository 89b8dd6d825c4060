// Sizes that the CUDA kernels can count. Within an image, a row of the weights and along a side
// they compute in 32 bits; from one image, row or task to another in 64.
#pragma once

#include <c10/util/Exception.h>

#include <algorithm>
#include <limits>

#include "execution/conv_shape.h"

namespace fastmeta {

inline constexpr int64_t kMostInInt = std::numeric_limits<int>::max();
// Distance past the end of a matrix up to which a thread counts: of a tile, and of a slice of a
// product.
inline constexpr int64_t kPastEnd = 128;
// Longest side: -2^30 (kNowhere) lies outside, and stays negative when a distance is added.
inline constexpr int64_t kMostOfSide = 1 << 30;

inline void check_counts_in_int(const ConvShape& s, const char* op) {
  const auto check = [op](const char* what, int64_t size, int64_t most) {
    TORCH_CHECK(size <= most, op, ": ", what, ": expected at most ", most, " on CUDA, got ", size);
  };
  if (s.is_depthwise()) return;  // counted in 64 bits
  check("numbers of an input image (channels x height x width)", s.channels * s.in_positions(),
        kMostInInt);
  check("numbers of an output image (outputs x height x width)", s.outputs * s.out_positions(),
        kMostInInt);
  check("channels x kernel size", s.channels * s.taps(), kMostInInt - kPastEnd);
  check("outputs x kernel size", s.outputs * s.taps(), kMostInInt - kPastEnd);
  check("the padded height or width",
        std::max(s.height + 2 * s.padding_h, s.width + 2 * s.padding_w), kMostOfSide);
  check("the stride", std::max(s.stride_h, s.stride_w), kMostOfSide);
  check("the dilation x (kernel + 128)",
        std::max(s.dilation_h * (s.kernel_h + kPastEnd), s.dilation_w * (s.kernel_w + kPastEnd)),
        kMostOfSide);
}

}  // namespace fastmeta
