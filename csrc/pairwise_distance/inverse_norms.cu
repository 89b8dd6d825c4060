#include "common/ceil_div.h"
#include "common/launch.cuh"
#include "common/reduce.cuh"
#include "common/scalar.cuh"
#include "common/workspace.h"
#include "pairwise_distance/operands.h"

namespace fastmeta {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// inverse_norms[r] = 1 / max(|row r|, eps), the rows of x and then those of y; x [x_rows, D],
// y [y_rows, D]. A warp owns a row, in acc_t.
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    inverse_norms_kernel(const scalar_t* x, int64_t x_rows, const scalar_t* y, int64_t y_rows,
                         int64_t features, acc_t<scalar_t>* inverse_norms) {
  using value_t = acc_t<scalar_t>;
  const int64_t r = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (r >= x_rows + y_rows) return;
  const scalar_t* row = r < x_rows ? x + r * features : y + (r - x_rows) * features;
  value_t sum = 0;
  for (int64_t d = threadIdx.x % kWarp; d < features; d += kWarp) {
    const value_t value = widen(row[d]);
    sum += value * value;
  }
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp != 0) return;
  const value_t norm = finish(Metric::kEuclidean, sum), eps = kCosineEps;
  inverse_norms[r] = 1 / (norm < eps ? eps : norm);
}

}  // namespace

int64_t inverse_norms_bytes(const PairwiseOperands& operands) {
  if (operands.metric != Metric::kCosine) return 0;
  const auto& shape = operands.shape;
  return with_dtype(operands.dtype, [&](auto type) {
    Workspace space(nullptr);
    space.take<acc_t<typename decltype(type)::type>>(shape.tasks * (shape.queries + shape.classes));
    return space.bytes();
  });
}

int launch_inverse_norms(PairwiseOperands& operands, void* inverse_norms, void* stream) {
  if (operands.metric != Metric::kCosine) return cudaSuccess;
  operands.inverse_norms = inverse_norms;
  const auto& shape = operands.shape;
  const int64_t x_rows = shape.tasks * shape.queries, y_rows = shape.tasks * shape.classes;
  return with_dtype(operands.dtype, [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    return launch(inverse_norms_kernel<scalar_t>, ceil_div(x_rows + y_rows, kWarps), kThreads, 0,
                  static_cast<cudaStream_t>(stream), static_cast<const scalar_t*>(operands.x),
                  x_rows, static_cast<const scalar_t*>(operands.y), y_rows, shape.features,
                  static_cast<acc_t<scalar_t>*>(inverse_norms));
  });
}

}  // namespace fastmeta
