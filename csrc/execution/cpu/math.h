// Math on at::vec::Vectorized.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <type_traits>

#include "execution/math.h"

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
#if defined(CPU_CAPABILITY_AVX512)
    // Vectorized converts between a vector and a mask.
    if constexpr (std::is_same_v<value_t, float>) {
      return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x);
    } else {
      return _mm512_mask_blend_pd(_mm512_cmp_pd_mask(a, b, _CMP_LT_OQ), y, x);
    }
#else
    return Vec::blendv(y, x, a < b);
#endif
  }
  static Vec if_equal(const Vec& a, const Vec& b, const Vec& x, const Vec& y) {
#if defined(CPU_CAPABILITY_AVX512)
    if constexpr (std::is_same_v<value_t, float>) {
      return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ), y, x);
    } else {
      return _mm512_mask_blend_pd(_mm512_cmp_pd_mask(a, b, _CMP_EQ_OQ), y, x);
    }
#else
    return Vec::blendv(y, x, a == b);
#endif
  }

  static Vec sigmoid(const Vec& x) { return Vec(1) / (Vec(1) + exp(x.neg())); }
};

}  // namespace fastmeta
