// Matrix product for sizes that stay in the caches: C[m, n] (+)= alpha A B. A tile of C is kept in
// registers while the sum runs; nothing is packed.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>
#include <utility>

#include "common/ceil_div.h"
#include "common/cpu/gemm.h"

namespace fastmeta {

template <typename value_t>
class RegisterGemm {
  using Vec = at::vec::Vectorized<value_t>;

 public:
  static constexpr int64_t kWidth = Vec::size();

  // Multiplies b [depth, n] into c [m, n], row-major and contiguous; n is a multiple of kWidth.
  static void run(int64_t m, int64_t n, int64_t depth, const Operand<value_t>& a, const value_t* b,
                  value_t* c, bool adds, value_t alpha = 1) {
    const int64_t row = a.transposed ? 1 : a.stride, next = a.transposed ? a.stride : 1;
    // Run through C, or B, in one go if the other matrix stays in the cache.
    const bool wide = n > kVectors * kWidth;
    const int64_t parts = wide && is_small(depth, n) ? ceil_div(m, int64_t(kRows)) : 1;
    const int64_t slices =
        wide && is_small(m, n) ? std::max(ceil_div(depth, kSlice), int64_t(1)) : 1;
    for (int64_t i = 0; i < parts; ++i) {
      const int64_t begin = m * i / parts, end = m * (i + 1) / parts;
      for (int64_t k = 0; k < slices; ++k) {
        const int64_t first = depth * k / slices, last = depth * (k + 1) / slices;
        const value_t* from_a = a.data + begin * row + first * next;
        run_columns(end - begin, n,
                    {n, last - first, row, next, from_a, b + first * n, c + begin * n,
                     adds || k > 0, alpha});
      }
    }
  }

 private:
  static constexpr int64_t kSmall = 64 << 10;  // bytes that stay in the cache
  static constexpr int64_t kSlice = 16;        // rows of B at a time
  // 24 vectors of sums fit 32 registers, 12 fit 16.
  static constexpr int kRows = 6, kVectors = sizeof(Vec) == 64 ? 4 : 2;

  static bool is_small(int64_t rows, int64_t columns) {
    return rows * columns * int64_t(sizeof(value_t)) <= kSmall;
  }

  struct Columns {
    int64_t stride, depth;
    int64_t row, next;  // from an element of A to its neighbour in the next row, in the next k
    const value_t *a, *b;
    value_t* c;
    bool adds;
    value_t alpha;

    template <int... counts>
    void run_rest(int64_t m, int64_t vectors, std::integer_sequence<int, counts...>) const {
      ((counts > 0 && vectors == counts ? run<counts>(m) : void()), ...);
    }
    // Cuts rows into tiles of kRows, or one less, so that no tile is almost empty.
    template <int vectors>
    void run(int64_t m) const {
      const int64_t tiles = ceil_div(m, int64_t(kRows));
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t begin = m * t / tiles, end = m * (t + 1) / tiles;
        run_rows<vectors>(begin, end - begin, std::make_integer_sequence<int, kRows>{});
      }
    }
    template <int vectors, int... before>
    void run_rows(int64_t begin, int64_t rows, std::integer_sequence<int, before...>) const {
      ((rows == before + 1 ? tile<before + 1, vectors>(begin) : void()), ...);
    }

    template <int rows, int vectors>
    void tile(int64_t begin) const {
      const value_t *left = a + begin * row, *right = b;
      value_t* target = c + begin * stride;
      Vec sum[rows][vectors];
#pragma GCC unroll 8
      for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < vectors; ++j) {
          sum[i][j] = Vec(value_t(0));
        }
      }
      for (int64_t k = 0; k < depth; ++k, left += next, right += stride) {
        Vec of_b[vectors];
#pragma GCC unroll 8
        for (int j = 0; j < vectors; ++j) of_b[j] = Vec::loadu(right + j * kWidth);
#pragma GCC unroll 8
        for (int i = 0; i < rows; ++i) {
          // One element of A, in all lanes, serves all vectors of the row of B.
          const Vec of_a(left[i * row]);
#pragma GCC unroll 8
          for (int j = 0; j < vectors; ++j) sum[i][j] = at::vec::fmadd(of_a, of_b[j], sum[i][j]);
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < vectors; ++j) {
          value_t* place = target + i * stride + j * kWidth;
          const Vec before = adds ? Vec::loadu(place) : Vec(value_t(0));
          at::vec::fmadd(Vec(alpha), sum[i][j], before).store(place);
        }
      }
    }
  };

  // Runs all n columns; `columns` describes the first ones.
  static void run_columns(int64_t m, int64_t n, Columns columns) {
    for (int64_t j = 0; j < n; j += kVectors * kWidth) {
      const int64_t vectors = (n - j) / kWidth;
      if (vectors >= kVectors) {
        columns.template run<kVectors>(m);
      } else {
        columns.run_rest(m, vectors, std::make_integer_sequence<int, kVectors>{});
      }
      columns.b += kVectors * kWidth;
      columns.c += kVectors * kWidth;
    }
  }
};

// Computes C [m, n] (+)= op(A) B, b and c row-major and contiguous. Uses the BLAS if n is no
// multiple of a vector, or if B is so deep that its columns leave the L2 cache; else registers.
template <typename value_t>
void multiply(int64_t m, int64_t n, int64_t depth, const Operand<value_t>& a, const value_t* b,
              value_t* c, bool adds) {
  constexpr int64_t kMostDepth = 1024;
  if (n % RegisterGemm<value_t>::kWidth == 0 && depth <= kMostDepth) {
    RegisterGemm<value_t>::run(m, n, depth, a, b, c, adds);
  } else {
    gemm<value_t>(m, n, depth, a, {b, n}, c, n, adds);
  }
}

}  // namespace fastmeta
