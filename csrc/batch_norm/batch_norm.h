// Batch norm of each task's images by the statistics of the batch at hand, its gradient, and the
// gradient of the gradient. For one channel of one task, with means over its n = B P numbers:
//
// mean = mean(x),  rstd = 1 / sqrt(mean((x - mean)^2) + eps),  xh = (x - mean) rstd
// y    = weight xh + bias
//
// for g, the upstream gradient of y:
// grad_x      = weight rstd (g - mean(g) - xh mean(g xh))
// grad_weight = sum(g xh),  grad_bias = sum(g)
//
// for v, w, b, the upstream gradients of grad_x, grad_weight, grad_bias:
// grad_g      = weight rstd (v - mean(v) - xh mean(v xh)) + w xh + b
// grad_weight = rstd sum(v (g - mean(g) - xh mean(g xh)))
// grad_x      = rstd (u - mean(u) - xh mean(u xh)) - xh weight rstd grad_weight / n,
//               where u = w g - weight rstd (v mean(g xh) + g mean(v xh))
//
// x, y, g, v [T, B, C, P], P positions; weight, bias, w, b [T, C]; all contiguous. No pass stores
// anything for the next one: each reads a channel again, from the cache, to get its statistics.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/dtype.h"
#include "common/host_device.h"

namespace fastmeta {

struct BatchNormShape {
  int64_t tasks, images, channels, positions;

  int64_t all_channels() const { return tasks * channels; }
  FASTMETA_HOST_DEVICE int64_t count() const { return images * positions; }
  // Offset of the channel's first number, counting channels over all tasks; next() is the step to
  // its next image.
  FASTMETA_HOST_DEVICE int64_t begin(int64_t channel) const {
    return (channel / channels * images * channels + channel % channels) * positions;
  }
  FASTMETA_HOST_DEVICE int64_t image_stride() const { return channels * positions; }
};

// Arrays that a pass reads and writes.
struct BatchNormForward {
  const void *x, *weight, *bias;
  void* y;
};
struct BatchNormBackward {
  const void *g, *x, *weight;
  void *grad_x, *grad_weight, *grad_bias;
};
struct BatchNormSecond {
  const void *v, *w, *b, *g, *x, *weight;
  void *grad_g, *grad_x, *grad_weight;
};

// xh of a channel. `many_t` is one number, or as many as a vector has.
template <typename number_t>
struct Normaliser {
  number_t mean, rstd;

  FASTMETA_HOST_DEVICE Normaliser(number_t mean_x, number_t variance, number_t eps)
      : mean(mean_x), rstd(1 / std::sqrt(variance + eps)) {}

  template <typename many_t>
  FASTMETA_HOST_DEVICE many_t operator()(many_t x) const {
    return (x - many_t(mean)) * many_t(rstd);
  }
};

// scale (g - mean(g) - xh mean(g xh)), the derivative of xh times `scale`.
template <typename number_t>
struct Centred {
  number_t scale, mean, along;

  template <typename many_t>
  FASTMETA_HOST_DEVICE many_t operator()(many_t g, many_t xh) const {
    return many_t(scale) * (g - many_t(mean) - xh * many_t(along));
  }
};

// Gradient of the gradient, from the channel's means of v, g, v xh, g xh and v g.
template <typename number_t>
struct SecondGradient {
  Centred<number_t> of_v;
  number_t w, b;            // upstream of grad_weight, grad_bias
  number_t from_v, from_g;  // u = from_v v + from_g g
  number_t mean_u, rstd, along, grad_weight;

  FASTMETA_HOST_DEVICE SecondGradient(const number_t (&means)[5], number_t weight, number_t rstd,
                                      number_t w, number_t b, number_t count)
      : of_v{weight * rstd, means[0], means[2]}, w(w), b(b), rstd(rstd) {
    const number_t mean_v = means[0], mean_g = means[1], v_xh = means[2], g_xh = means[3];
    from_v = -weight * rstd * g_xh;
    from_g = w - weight * rstd * v_xh;
    mean_u = from_v * mean_v + from_g * mean_g;
    const number_t mean_weight = rstd * (means[4] - mean_v * mean_g - v_xh * g_xh);
    grad_weight = mean_weight * count;
    along = rstd * (from_v * v_xh + from_g * g_xh + weight * mean_weight);
  }

  template <typename many_t>
  FASTMETA_HOST_DEVICE many_t grad_g(many_t v, many_t xh) const {
    return of_v(v, xh) + many_t(w) * xh + many_t(b);
  }
  template <typename many_t>
  FASTMETA_HOST_DEVICE many_t grad_x(many_t v, many_t g, many_t xh) const {
    const many_t u = many_t(from_v) * v + many_t(from_g) * g - many_t(mean_u);
    return many_t(rstd) * u - many_t(along) * xh;
  }
};

// CUDA launchers for float and double: device pointers, result a cudaError_t.
int launch_batch_norm(Dtype dtype, const BatchNormShape& shape, double eps,
                      const BatchNormForward& pass, void* stream);
int launch_batch_norm(Dtype dtype, const BatchNormShape& shape, double eps,
                      const BatchNormBackward& pass, void* stream);
int launch_batch_norm(Dtype dtype, const BatchNormShape& shape, double eps,
                      const BatchNormSecond& pass, void* stream);

}  // namespace fastmeta
