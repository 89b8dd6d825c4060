// Elementwise activations f: value, slope f' and curvature f''.
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "execution/math.h"

namespace fastmeta {

enum class ActivationKind : int64_t {
  kRelu,
  kLeakyRelu,  // a: slope
  kElu,        // a: alpha
  kGelu,
  kGeluTanh,
  kSilu,
  kTanh,
  kSigmoid,
  kSoftplus,  // a: beta, b: threshold
  kMish,
};

// Whether the number stands for a kind; kMish is the last one.
constexpr bool is_activation(int64_t kind) {
  return 0 <= kind && kind <= static_cast<int64_t>(ActivationKind::kMish);
}

struct Activation {
  ActivationKind kind;
  double a, b;

  template <typename number_t>
  FASTMETA_HOST_DEVICE number_t value(const number_t& z) const;
  template <typename number_t>
  FASTMETA_HOST_DEVICE number_t slope(const number_t& z) const;
  template <typename number_t>
  FASTMETA_HOST_DEVICE number_t curvature(const number_t& z) const;

  // Computes f'(z) x; 0 if f' is 0, also for an x that is not finite.
  template <typename number_t>
  FASTMETA_HOST_DEVICE number_t times_slope(const number_t& z, const number_t& x) const {
    if (kind != ActivationKind::kRelu) return slope(z) * x;
    return Math<number_t>::if_less(number_t(0), z, x, number_t(0));
  }
  // Whether f'' is anything but 0.
  FASTMETA_HOST_DEVICE constexpr bool bends() const {
    return kind != ActivationKind::kRelu && kind != ActivationKind::kLeakyRelu;
  }
};

// Activation whose kind the compiler knows: the choice is made once, not for each element.
template <ActivationKind known>
struct KnownActivation {
  double a, b;

  FASTMETA_HOST_DEVICE constexpr Activation any() const { return {known, a, b}; }
  template <typename number_t>
  FASTMETA_HOST_DEVICE number_t value(const number_t& z) const {
    return any().value(z);
  }
  template <typename number_t>
  FASTMETA_HOST_DEVICE number_t times_slope(const number_t& z, const number_t& x) const {
    return any().times_slope(z, x);
  }
  template <typename number_t>
  FASTMETA_HOST_DEVICE number_t curvature(const number_t& z) const {
    return any().curvature(z);
  }
  FASTMETA_HOST_DEVICE constexpr bool bends() const { return any().bends(); }
};

inline constexpr double kRootHalf = 0.70710678118654752440;       // sqrt(1 / 2)
inline constexpr double kNormalDensity = 0.39894228040143267794;  // 1 / sqrt(2 pi)
inline constexpr double kGeluTanhScale = 0.79788456080286535588;  // sqrt(2 / pi)
inline constexpr double kGeluTanhCubic = 0.044715;

template <typename number_t>
FASTMETA_HOST_DEVICE number_t normal_cdf(const number_t& z) {
  return number_t(0.5) * (number_t(1) + Math<number_t>::erf(z * number_t(kRootHalf)));
}

template <typename number_t>
FASTMETA_HOST_DEVICE number_t normal_density(const number_t& z) {
  return number_t(kNormalDensity) * Math<number_t>::exp(number_t(-0.5) * z * z);
}

// t = tanh(u), u = c (z + d z^3) of the approximation of GELU (Hendrycks 2016), and u', u''.
template <typename number_t>
struct GeluTanh {
  number_t t, u1, u2;
  FASTMETA_HOST_DEVICE explicit GeluTanh(const number_t& z)
      : t(Math<number_t>::tanh(number_t(kGeluTanhScale) *
                               (z + number_t(kGeluTanhCubic) * z * z * z))),
        u1(number_t(kGeluTanhScale) * (number_t(1) + number_t(3 * kGeluTanhCubic) * z * z)),
        u2(number_t(6 * kGeluTanhScale * kGeluTanhCubic) * z) {}
};

// t = tanh(log(1 + e^z)) of mish (Misra 2020), and t', t''. Of z up to `most`, where t is 1.
template <typename number_t>
struct Mish {
  static constexpr double most = 20;
  number_t t, t1, t2;
  FASTMETA_HOST_DEVICE explicit Mish(const number_t& z) {
    using M = Math<number_t>;
    const number_t one(1), two(2);
    const number_t e = M::exp(M::if_less(number_t(most), z, number_t(most), z));
    // With n = e (e + 2): t = n / (n + 2), and 1 - t^2 without a difference of close numbers.
    const number_t n = e * (e + two), rest = n + two, sigmoid = e / (one + e);
    const number_t sech2 = number_t(4) * (n + one) / rest / rest;
    t = n / rest;
    t1 = sech2 * sigmoid;
    t2 = t1 * (one - sigmoid - two * t * sigmoid);
  }
};

template <typename number_t>
FASTMETA_ALWAYS_INLINE FASTMETA_HOST_DEVICE number_t Activation::value(const number_t& z) const {
  using M = Math<number_t>;
  const number_t zero(0), one(1), half(0.5);
  switch (kind) {
    case ActivationKind::kRelu:
      return M::if_less(z, zero, zero, z);
    case ActivationKind::kLeakyRelu:
      return M::if_less(zero, z, z, number_t(a) * z);
    case ActivationKind::kElu:
      return M::if_less(zero, z, z, number_t(a) * M::expm1(z));
    case ActivationKind::kGelu:
      return z * normal_cdf(z);
    case ActivationKind::kGeluTanh:
      return half * z * (one + GeluTanh<number_t>(z).t);
    case ActivationKind::kSilu:
      return z * M::sigmoid(z);
    case ActivationKind::kTanh:
      return M::tanh(z);
    case ActivationKind::kSigmoid:
      return M::sigmoid(z);
    case ActivationKind::kSoftplus: {
      const number_t scaled = number_t(a) * z;
      return M::if_less(number_t(b), scaled, z, M::log1p(M::exp(scaled)) / number_t(a));
    }
    case ActivationKind::kMish:
      return z * Mish<number_t>(z).t;
  }
  return z;
}

template <typename number_t>
FASTMETA_ALWAYS_INLINE FASTMETA_HOST_DEVICE number_t Activation::slope(const number_t& z) const {
  using M = Math<number_t>;
  const number_t zero(0), one(1), half(0.5);
  switch (kind) {
    case ActivationKind::kRelu:
      return M::if_less(zero, z, one, zero);
    case ActivationKind::kLeakyRelu:
      return M::if_less(zero, z, one, number_t(a));
    case ActivationKind::kElu:
      return M::if_less(zero, z, one, number_t(a) * M::exp(z));
    case ActivationKind::kGelu:
      return normal_cdf(z) + z * normal_density(z);
    case ActivationKind::kGeluTanh: {
      const GeluTanh<number_t> g(z);
      return half * (one + g.t + z * (one - g.t * g.t) * g.u1);
    }
    case ActivationKind::kSilu: {
      const number_t s = M::sigmoid(z);
      return s * (one + z * (one - s));
    }
    case ActivationKind::kTanh: {
      const number_t t = M::tanh(z);
      return one - t * t;
    }
    case ActivationKind::kSigmoid: {
      const number_t s = M::sigmoid(z);
      return s * (one - s);
    }
    case ActivationKind::kSoftplus: {
      const number_t scaled = number_t(a) * z;
      return M::if_less(number_t(b), scaled, one, M::sigmoid(scaled));
    }
    case ActivationKind::kMish: {
      const Mish<number_t> m(z);
      return M::if_less(number_t(m.most), z, one, m.t + z * m.t1);
    }
  }
  return one;
}

template <typename number_t>
FASTMETA_ALWAYS_INLINE FASTMETA_HOST_DEVICE number_t
Activation::curvature(const number_t& z) const {
  using M = Math<number_t>;
  const number_t zero(0), one(1), two(2), half(0.5);
  switch (kind) {
    case ActivationKind::kRelu:
    case ActivationKind::kLeakyRelu:
      return zero;
    case ActivationKind::kElu:
      return M::if_less(zero, z, zero, number_t(a) * M::exp(z));
    case ActivationKind::kGelu:
      return normal_density(z) * (two - z * z);
    case ActivationKind::kGeluTanh: {
      const GeluTanh<number_t> g(z);
      const number_t sech2 = one - g.t * g.t;
      return sech2 * (g.u1 + half * z * (g.u2 - two * g.t * g.u1 * g.u1));
    }
    case ActivationKind::kSilu: {
      const number_t s = M::sigmoid(z);
      return s * (one - s) * (two + z * (one - two * s));
    }
    case ActivationKind::kTanh: {
      const number_t t = M::tanh(z);
      return (zero - two) * t * (one - t * t);
    }
    case ActivationKind::kSigmoid: {
      const number_t s = M::sigmoid(z);
      return s * (one - s) * (one - two * s);
    }
    case ActivationKind::kSoftplus: {
      const number_t scaled = number_t(a) * z, s = M::sigmoid(scaled);
      return M::if_less(number_t(b), scaled, zero, number_t(a) * s * (one - s));
    }
    case ActivationKind::kMish: {
      const Mish<number_t> m(z);
      return M::if_less(number_t(m.most), z, zero, two * m.t1 + z * m.t2);
    }
  }
  return zero;
}

// Calls fn(f) with an activation whose kind the compiler knows.
template <typename Fn>
FASTMETA_HOST_DEVICE void with_known_activation(const Activation& f, const Fn& fn) {
  switch (f.kind) {
#define FASTMETA_KIND(kind)  \
  case ActivationKind::kind: \
    return fn(KnownActivation<ActivationKind::kind>{f.a, f.b});
    FASTMETA_KIND(kRelu)
    FASTMETA_KIND(kLeakyRelu)
    FASTMETA_KIND(kElu)
    FASTMETA_KIND(kGelu)
    FASTMETA_KIND(kGeluTanh)
    FASTMETA_KIND(kSilu)
    FASTMETA_KIND(kTanh)
    FASTMETA_KIND(kSigmoid)
    FASTMETA_KIND(kSoftplus)
    FASTMETA_KIND(kMish)
#undef FASTMETA_KIND
  }
}

}  // namespace fastmeta
