// Functions of a number that layers need: of float and double here, of vectors in cpu/math.h.
#pragma once

#include <cmath>

#include "common/host_device.h"

namespace fastmeta {

template <typename number_t>
struct Math {
  FASTMETA_HOST_DEVICE static number_t exp(number_t x) { return std::exp(x); }
  FASTMETA_HOST_DEVICE static number_t expm1(number_t x) { return std::expm1(x); }
  FASTMETA_HOST_DEVICE static number_t log(number_t x) { return std::log(x); }
  FASTMETA_HOST_DEVICE static number_t log1p(number_t x) { return std::log1p(x); }
  FASTMETA_HOST_DEVICE static number_t tanh(number_t x) { return std::tanh(x); }
  FASTMETA_HOST_DEVICE static number_t erf(number_t x) { return std::erf(x); }
  FASTMETA_HOST_DEVICE static number_t sqrt(number_t x) { return std::sqrt(x); }
  FASTMETA_HOST_DEVICE static number_t abs(number_t x) { return std::abs(x); }
  FASTMETA_HOST_DEVICE static number_t larger(number_t a, number_t b) { return a < b ? b : a; }

  // Selects: a < b ? x : y
  FASTMETA_HOST_DEVICE static number_t if_less(number_t a, number_t b, number_t x, number_t y) {
    return a < b ? x : y;
  }
  FASTMETA_HOST_DEVICE static number_t if_equal(number_t a, number_t b, number_t x, number_t y) {
    return a == b ? x : y;
  }

  FASTMETA_HOST_DEVICE static number_t sigmoid(number_t x) { return 1 / (1 + exp(-x)); }
};

}  // namespace fastmeta
