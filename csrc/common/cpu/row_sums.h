// Sums over pairs of rows: c[i, j] = sum over d of term(a_id, b_jd), and products <a_i, b_j>.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>
#include <utility>

#include "common/ceil_div.h"
#include "common/cpu/gemm.h"

namespace fastmeta {

// Tiles of c kept in registers as vectors of partial sums; for few and long rows. Term::add(sum, a, b)
// adds the term of two vectors.
template <typename value_t, typename Term>
class RowSums {
  using Vec = at::vec::Vectorized<value_t>;

 public:
  // Takes contiguous a [m, depth] and b [n, depth]; rows of c are c_stride apart.
  static void run(int64_t m, int64_t n, int64_t depth, const value_t* a, const value_t* b,
                  value_t* c, int64_t c_stride) {
    const Rows rows{depth, c_stride, a, b, c};
    const int64_t row_tiles = ceil_div(m, kTile), column_tiles = ceil_div(n, kTile);
    for (int64_t i = 0; i < row_tiles; ++i) {
      const int64_t row = m * i / row_tiles, row_end = m * (i + 1) / row_tiles;
      for (int64_t j = 0; j < column_tiles; ++j) {
        const int64_t column = n * j / column_tiles, column_end = n * (j + 1) / column_tiles;
        rows.run(row, row_end - row, column, column_end - column,
                 std::make_integer_sequence<int, kTile>{});
      }
    }
  }

 private:
  static constexpr int kTile = sizeof(Vec) == 64 ? 5 : 3;  // 25 + 6 of 32 registers, 9 + 4 of 16

  struct Rows {
    int64_t depth, c_stride;
    const value_t *a, *b;
    value_t* c;

    template <int... before>
    void run(int64_t i, int64_t rows, int64_t j, int64_t columns,
             std::integer_sequence<int, before...> sizes) const {
      ((rows == before + 1 ? run<before + 1>(i, j, columns, sizes) : void()), ...);
    }
    template <int rows, int... before>
    void run(int64_t i, int64_t j, int64_t columns, std::integer_sequence<int, before...>) const {
      ((columns == before + 1 ? tile<rows, before + 1>(i, j) : void()), ...);
    }

    template <int rows, int columns>
    void tile(int64_t i, int64_t j) const {
      const value_t *left = a + i * depth, *right = b + j * depth;
      Vec sum[rows][columns];
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
        for (int q = 0; q < columns; ++q) sum[r][q] = Vec(value_t(0));
      }
      const auto add = [&](int64_t d, auto load) {
        Vec of_b[columns];
#pragma GCC unroll 8
        for (int q = 0; q < columns; ++q) of_b[q] = load(right + q * depth + d);
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
          const Vec of_a = load(left + r * depth + d);
#pragma GCC unroll 8
          for (int q = 0; q < columns; ++q) sum[r][q] = Term::add(sum[r][q], of_a, of_b[q]);
        }
      };
      const int64_t whole = depth / Vec::size() * Vec::size(), rest = depth - whole;
      for (int64_t d = 0; d < whole; d += Vec::size()) {
        add(d, [](const value_t* p) { return Vec::loadu(p); });
      }
      if (rest > 0) add(whole, [rest](const value_t* p) { return Vec::loadu(p, rest); });
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
        for (int q = 0; q < columns; ++q) {
          // Lanes add up only once, at the end.
          c[(i + r) * c_stride + j + q] =
              at::vec::vec_reduce_all<value_t>([](Vec x, Vec y) { return x + y; }, sum[r][q]);
        }
      }
    }
  };
};

struct ProductOfVectors {
  template <typename Vec>
  static Vec add(const Vec& sum, const Vec& a, const Vec& b) {
    return at::vec::fmadd(a, b, sum);
  }
};

// Computes c [m, n] = a b' for contiguous a [m, depth] and b [n, depth]: by the BLAS if both have
// many rows, else in registers.
template <typename value_t>
void row_dots(int64_t m, int64_t n, int64_t depth, const value_t* a, const value_t* b, value_t* c,
              int64_t c_stride) {
  constexpr int64_t kFewRows = 64;
  if (depth == 0 || std::min(m, n) <= kFewRows) {
    RowSums<value_t, ProductOfVectors>::run(m, n, depth, a, b, c, c_stride);
  } else {
    gemm<value_t>(m, n, depth, {a, depth}, {b, depth, true}, c, c_stride, false);
  }
}

}  // namespace fastmeta
