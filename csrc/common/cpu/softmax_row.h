// Vectors along a row of logits.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cstdint>

namespace fastmeta {

template <typename Vec>
auto largest_lane(const Vec& values) {
  return at::vec::vec_reduce_all<typename Vec::value_type>(
      [](Vec a, Vec b) { return at::vec::maximum(a, b); }, values);
}

template <typename Vec>
auto sum_of_lanes(const Vec& values) {
  return at::vec::vec_reduce_all<typename Vec::value_type>([](Vec a, Vec b) { return a + b; },
                                                           values);
}

}  // namespace fastmeta
