// Row-major matrix product: C[M, N] = alpha op(A) op(B), or C += alpha op(A) op(B).
//
// The BLAS that libtorch was built with does the work, called directly to save a tensor and a
// dispatch for each product. MKL takes transposed operands at full speed, 190 to 220 GFLOP/s on an
// AVX-512 core. If libtorch exports no BLAS, at::addmm does the work.
#pragma once

#include <ATen/ops/addmm.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/ScalarTypeToTypeMeta.h>

#include <algorithm>
#include <array>
#include <climits>
#include <cstdint>
#include <type_traits>

#define FASTMETA_BLAS_GEMM(name, value_t)                                                       \
  extern "C" [[gnu::weak]] void name(                                                           \
      const char* trans_a, const char* trans_b, const int* m, const int* n, const int* k,       \
      const value_t* alpha, const value_t* a, const int* lda, const value_t* b, const int* ldb, \
      const value_t* beta, value_t* c, const int* ldc)
FASTMETA_BLAS_GEMM(sgemm_, float);
FASTMETA_BLAS_GEMM(dgemm_, double);
#undef FASTMETA_BLAS_GEMM

namespace fastmeta {

// A row-major matrix whose rows are `stride` apart.
template <typename value_t>
struct Operand {
  const value_t* data;
  int64_t stride;
  bool transposed = false;
};

// Multiplies; M, N and K are at least 1.
template <typename value_t>
void gemm(int64_t m, int64_t n, int64_t k, const Operand<value_t>& a, const Operand<value_t>& b,
          value_t* c, int64_t c_stride, bool accumulates, value_t alpha = 1) {
  const auto blas = [] {
    if constexpr (std::is_same_v<value_t, float>) {
      return sgemm_;
    } else {
      return dgemm_;
    }
  }();
  const value_t beta = accumulates ? 1 : 0;
  if (blas != nullptr && std::max({m, n, k, a.stride, b.stride, c_stride}) <= INT_MAX) {
    // BLAS is column-major: it reads a row-major array as its transpose, so compute C' = B' A'.
    const int sizes[] = {static_cast<int>(n), static_cast<int>(m), static_cast<int>(k)};
    const int strides[] = {static_cast<int>(b.stride), static_cast<int>(a.stride),
                           static_cast<int>(c_stride)};
    blas(b.transposed ? "T" : "N", a.transposed ? "T" : "N", &sizes[0], &sizes[1], &sizes[2],
         &alpha, b.data, &strides[0], a.data, &strides[1], &beta, c, &strides[2]);
    return;
  }
  const auto options = at::TensorOptions().dtype(c10::CppTypeToScalarType<value_t>::value);
  const auto matrix = [&](const Operand<value_t>& x, int64_t rows, int64_t columns) {
    const auto strides =
        x.transposed ? std::array{int64_t(1), x.stride} : std::array{x.stride, int64_t(1)};
    return at::from_blob(const_cast<value_t*>(x.data), {rows, columns}, strides, options);
  };
  auto out = matrix({c, c_stride}, m, n);
  at::addmm_out(out, out, matrix(a, m, k), matrix(b, k, n), beta, alpha);
}

}  // namespace fastmeta
