// Math of at::vec::Vectorized.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include "task_program/math.h"

namespace fastmeta {

template <typename value_t>
struct Math<at::vec::Vectorized<value_t>> {
  using Vec = at::vec::Vectorized<value_t>;

  static Vec exp(const Vec& x) { return x.exp(); }
  static Vec expm1(const Vec& x) { return x.expm1(); }
  static Vec log(const Vec& x) { return x.log(); }
  static Vec log1p(const Vec& x) { return x.log1p(); }
  static Vec tanh(const Vec& x) { return x.tanh(); }
  static Vec erf(const Vec& x) { return x.erf(); }
  static Vec sqrt(const Vec& x) { return x.sqrt(); }
  static Vec abs(const Vec& x) { return x.abs(); }
  static Vec larger(const Vec& a, const Vec& b) { return at::vec::maximum(a, b); }

  static Vec if_less(const Vec& a, const Vec& b, const Vec& x, const Vec& y) {
    return Vec::blendv(y, x, a < b);
  }
  static Vec if_equal(const Vec& a, const Vec& b, const Vec& x, const Vec& y) {
    return Vec::blendv(y, x, a == b);
  }

  static Vec sigmoid(const Vec& x) { return Vec(1) / (Vec(1) + exp(x.neg())); }
};

}  // namespace fastmeta
