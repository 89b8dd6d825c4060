// Elementwise activation, its gradient, and the gradient of the gradient:
//
// y      = f(x)
// grad_x = f'(x) g,                          g the upstream gradient of y
// grad_g = f'(x) v,  grad_x = f''(x) g v,    v the upstream gradient of grad_x
//
// All arrays have `count` numbers.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/host_device.h"
#include "execution/activation.h"

namespace fastmeta {

// A pass reads and writes numbers at its places: operator()(f, at) for accessors whose load and
// store take an array, of value_t.
template <typename value_t>
struct ActivationValue {
  const value_t* x;
  value_t* y;

  template <typename F, typename Accessor>
  FASTMETA_HOST_DEVICE void operator()(const F& f, const Accessor& at) const {
    at.store(y, f.value(at.load(x)));
  }
};

template <typename value_t>
struct ActivationGradient {
  const value_t *g, *x;
  value_t* grad_x;

  template <typename F, typename Accessor>
  FASTMETA_HOST_DEVICE void operator()(const F& f, const Accessor& at) const {
    at.store(grad_x, f.times_slope(at.load(x), at.load(g)));
  }
};

template <typename value_t>
struct ActivationSecond {
  const value_t *v, *g, *x;
  value_t *grad_g, *grad_x;

  template <typename F, typename Accessor>
  FASTMETA_HOST_DEVICE void operator()(const F& f, const Accessor& at) const {
    const auto place = at.load(x), along = at.load(v);
    at.store(grad_g, f.times_slope(place, along));
    at.store(grad_x, f.curvature(place) * at.load(g) * along);
  }
};

// CUDA launchers for float and double: device pointers, result a cudaError_t.
template <typename Pass>
int launch_activation(const Activation& f, int64_t count, const Pass& pass, void* stream);

}  // namespace fastmeta
