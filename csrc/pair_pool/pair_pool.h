// Maximum over windows of relu(x + y) for all pairs of maps, and its two linear derivatives.
//
//   pooled[t, q, n, c, i, j] = max over the window (i, j) of relu(x[t, q, c] + y[t, n, c])
//   place[t, q, n, c, i, j]  = number of the pixel in the window that is the maximum: the first, row by
//                              row; kNoPlace where no sum is above 0
//
//   gradient:  grad_x[t, q, c] = sum_n of grad_pooled, each at its place; grad_y alike with sum_q
//   gather:    x[t, q, c] + y[t, n, c], each at its place, 0 at kNoPlace
//
// Gradient and gather are each other's transpose, so they serve every order. x [T, Q, C, H, W], y
// [T, N, C, H, W], windows of pool x pool side by side; what fills no window is left out, with a
// gradient of zero. All arrays are contiguous; sums have one order, and are float for bfloat16 and half.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/host_device.h"

namespace fastmeta {

inline constexpr int64_t kMostPool = 15;  // a place must fit a byte
inline constexpr uint8_t kNoPlace = 255;

struct PairPoolShape {
  int64_t tasks;
  int64_t queries;
  int64_t classes;
  int64_t channels;
  int64_t height, width;
  int64_t pool;

  FASTMETA_HOST_DEVICE int64_t rows() const { return height / pool; }
  FASTMETA_HOST_DEVICE int64_t columns() const { return width / pool; }
  FASTMETA_HOST_DEVICE int64_t taps() const { return pool * pool; }  // pixels of a window
  // Windows of a map with all its channels, and numbers of one.
  FASTMETA_HOST_DEVICE int64_t windows() const { return channels * rows() * columns(); }
  FASTMETA_HOST_DEVICE int64_t numbers() const { return channels * height * width; }

  // Pixel `tap` of window `window`, in a map with all its channels.
  FASTMETA_HOST_DEVICE int64_t pixel(int64_t window, int64_t tap) const {
    const int64_t column = window % columns(), row = window / columns() % rows();
    const int64_t channel = window / columns() / rows();
    return (channel * height + row * pool + tap / pool) * width + column * pool + tap % pool;
  }
};

// CUDA launchers: device pointers, result a cudaError_t; maps of fewer than 2^32 numbers.
int launch_pair_pool(Dtype dtype, const PairPoolShape& shape, const void* x, const void* y,
                     void* pooled, uint8_t* place, void* stream);
int launch_pair_pool_gather(Dtype dtype, const PairPoolShape& shape, const void* x, const void* y,
                            const uint8_t* place, void* out, void* stream);
int launch_pair_pool_backward(Dtype dtype, const PairPoolShape& shape, const void* grad_pooled,
                              const uint8_t* place, void* grad_x, void* grad_y, void* stream);

}  // namespace fastmeta
