// Cholesky factor of a small system, and solutions for a few right-hand sides, in whole vectors.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "common/ceil_div.h"
#include "common/cpu/widen.h"
#include "ridge_head/ridge_head.h"

namespace fastmeta {

// Numbers in the vectors that hold n.
template <typename value_t>
int64_t padded(int64_t n) {
  constexpr int64_t kWidth = at::vec::Vectorized<value_t>::size();
  return ceil_div(n, kWidth) * kWidth;
}

// target += factor source, for whole vectors from the one that holds number `first` to `end`.
template <typename value_t>
void add_scaled_vectors(value_t* target, const value_t* source, value_t factor, int64_t first,
                        int64_t end) {
  using Vec = at::vec::Vectorized<value_t>;
  const Vec scale(factor);
  for (int64_t j = first / Vec::size() * Vec::size(); j < end; j += Vec::size()) {
    at::vec::fmadd(scale, Vec::loadu(source + j), Vec::loadu(target + j)).store(target + j);
  }
}

// Turns a symmetric system of n rows, padded<value_t>(n) apart, into the upper U with system = U'
// U, written to factor [n, n] with zeros below the diagonal. Returns whether the system is regular;
// NaN in it gives NaN in U.
template <typename value_t>
bool factorise(value_t* system, int64_t n, value_t* factor) {
  const int64_t stride = padded<value_t>(n);
  Buffer<value_t> least(n);
  for (int64_t k = 0; k < n; ++k) least[k] = least_pivot(system[k * stride + k], n);
  for (int64_t k = 0; k < n; ++k) {
    value_t* row = system + k * stride;
    if (row[k] <= least[k]) return false;
    const value_t root = std::sqrt(row[k]), inverse = 1 / root;
    for (int64_t j = k; j < n; ++j) row[j] *= inverse;
    row[k] = root;
    for (int64_t i = k + 1; i < n; ++i) {
      add_scaled_vectors(system + i * stride, row, -row[i], i, stride);
    }
    std::fill_n(factor + k * n, k, value_t(0));
    std::copy(row + k, row + n, factor + k * n + k);
  }
  return true;
}

// Replaces each of `count` rows b [n] by the solution z of U' U z = b. `columns` is scratch of
// n padded(count) numbers: a vector has a number of each row.
template <typename value_t>
void solve_rows(const value_t* factor, int64_t n, int64_t count, value_t* rows, value_t* columns) {
  const int64_t width = padded<value_t>(count);
  for (int64_t i = 0; i < n; ++i) {
    std::fill(columns + i * width + count, columns + (i + 1) * width, value_t(0));
    for (int64_t r = 0; r < count; ++r) columns[i * width + r] = rows[r * n + i];
  }
  const auto divide = [&](int64_t i) {
    const value_t inverse = 1 / factor[i * n + i];
    for (int64_t j = i * width; j < (i + 1) * width; ++j) columns[j] *= inverse;
    return columns + i * width;
  };
  for (int64_t i = 0; i < n; ++i) {
    const value_t* z = divide(i);
    for (int64_t j = i + 1; j < n; ++j) {
      add_scaled_vectors(columns + j * width, z, -factor[i * n + j], 0, width);
    }
  }
  for (int64_t i = n - 1; i >= 0; --i) {
    const value_t* z = divide(i);
    for (int64_t j = 0; j < i; ++j) {
      add_scaled_vectors(columns + j * width, z, -factor[j * n + i], 0, width);
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t r = 0; r < count; ++r) rows[r * n + i] = columns[i * width + r];
  }
}

}  // namespace fastmeta
