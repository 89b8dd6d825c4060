// Row-major matrix product on one thread: C[M, N] (+)= A[M, K] B[K, N].
//
// float32 runs on oneDNN's brgemm microkernel through libtorch: the speed of at::mm (190 GFLOP/s on
// an AVX-512 core) for blocks of any stride, without a tensor and a dispatch for each. Where it is
// absent (no AVX-512, float64) at::addmm does the work.
#pragma once

#include <ATen/native/CPUBlas.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/ScalarTypeToTypeMeta.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <type_traits>

namespace fastmeta {

// True where libtorch and this CPU run float32 brgemm; asked once, by running the smallest product.
inline bool has_brgemm() {
  static const bool works = [] {
#ifdef CPUBLAS_BRGEMM_F32F32F32
    if (!__builtin_cpu_supports("avx512f")) return false;
    try {
      const float one[16] = {1};
      float out[16];
      at::native::cpublas::brgemm(1, 16, 1, 1, 16, 16, false, one, one, out, false);
      return out[0] == 1.0F;
    } catch (const c10::Error&) {
      return false;
    }
#else
    return false;
#endif
  }();
  return works;
}

template <typename value_t>
void gemm(int64_t m, int64_t n, int64_t k, const value_t* a, int64_t lda, const value_t* b,
          int64_t ldb, value_t* c, int64_t ldc, bool accumulate) {
#ifdef CPUBLAS_BRGEMM_F32F32F32
  if constexpr (std::is_same_v<value_t, float>) {
    if (has_brgemm()) {
      at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, accumulate, a, b, c, false);
      return;
    }
  }
#endif
  const auto options = at::TensorOptions().dtype(c10::CppTypeToScalarType<value_t>::value);
  const auto matrix = [&](const value_t* data, int64_t rows, int64_t columns, int64_t stride) {
    return at::from_blob(const_cast<value_t*>(data), {rows, columns}, {stride, 1}, options);
  };
  auto out = matrix(c, m, n, ldc);
  at::addmm_out(out, out, matrix(a, m, k, lda), matrix(b, k, n, ldb), accumulate ? 1 : 0, 1);
}

}  // namespace fastmeta
