// The four passes of elementwise activations, see execution/activation.h, as elementwise steps.
//
//   forward           y = f(z)                  tangent forward    y_dot = f'(z) z_dot
//   backward          dz = f'(z) dy             tangent backward   dz_dot = f'(z) dy_dot
//                                                                         + f''(z) z_dot dy
#pragma once

#include "execution/activation.h"
#include "execution/executor.h"
#include "task_program/program/program.h"

namespace fastmeta {

template <typename Act, typename storage_t>
struct ActivationForward {
  Act f;
  Array<storage_t> z, y;

  template <typename Accessor>
  FASTMETA_HOST_DEVICE void operator()(const Accessor& at) const {
    at.store(y, f.value(at.load(z)));
  }
};

// Computes y_dot from z_dot, and dz from dy.
template <typename Act, typename storage_t>
struct ActivationSlope {
  Act f;
  Array<storage_t> z, source, target;
  bool adds = false;

  template <typename Accessor>
  FASTMETA_HOST_DEVICE void operator()(const Accessor& at) const {
    const typename Accessor::number_t value = f.times_slope(at.load(z), at.load(source));
    at.store(target, adds ? at.load(target) + value : value);
  }
};

template <typename Act, typename storage_t>
struct ActivationTangentBackward {
  Act f;
  Array<storage_t> z, z_dot, dy, dy_dot, dz_dot;
  bool adds;

  template <typename Accessor>
  FASTMETA_HOST_DEVICE void operator()(const Accessor& at) const {
    const typename Accessor::number_t z_here = at.load(z);
    auto value = f.times_slope(z_here, at.load(dy_dot));
    if (f.bends() && z_dot) value = value + f.curvature(z_here) * at.load(z_dot) * at.load(dy);
    at.store(dz_dot, adds ? at.load(dz_dot) + value : value);
  }
};

// Calls fn(f) with the activation of an instruction; on an executor that compiles each kind by
// itself, f is one whose kind the compiler knows.
template <typename Executor, typename Fn>
FASTMETA_HOST_DEVICE void with_activation(const Instruction& i, const Fn& fn) {
  const Activation f{i.activation, i.a, i.b};
  if constexpr (Executor::kCompilesEachActivation) {
    with_known_activation(f, fn);
  } else {
    fn(f);
  }
}

}  // namespace fastmeta
