#include <limits>

#include "common/ceil_div.h"
#include "common/cuda/launch.cuh"
#include "common/cuda/reduce.cuh"
#include "common/cuda/scalar.cuh"
#include "common/cuda/workspace.h"
#include "pairwise_distance/operands.h"

namespace fastmeta {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

template <typename value_t>
__device__ bool is_finite(value_t x) {
  constexpr value_t kLargest = std::numeric_limits<value_t>::max();
  // False for NaN too.
  return x >= -kLargest && x <= kLargest;
}

// centers[t, d] = mean over some rows n of y[t, n, d], evenly spread; y [T, N, D]. A number that is
// not finite counts as 0: it may spoil its own row's distances, not all. A block owns 32 features
// of a task, a warp every 8th row. A sample is near enough: any center gives the same distances.
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    centers_kernel(const scalar_t* y, int64_t classes, int64_t features, acc_t<scalar_t>* centers) {
  using value_t = acc_t<scalar_t>;
  constexpr int64_t kLargestSample = 128;
  __shared__ value_t sums[kWarps][kWarp];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t stride = center_stride(features), across = ceil_div(stride, kWarp);
  const int64_t task = blockIdx.x / across, d = blockIdx.x % across * kWarp + lane;
  const int64_t sample = classes < kLargestSample ? classes : kLargestSample;
  value_t sum = 0;
  if (d < features) {
    for (int64_t s = warp; s < sample; s += kWarps) {
      // Rows spread evenly: classes may be sorted.
      const auto value = widen(y[(task * classes + s * classes / sample) * features + d]);
      // Divides first, so that a sum of large numbers does not overflow.
      if (is_finite(value)) sum += value / sample;
    }
  }
  sums[warp][lane] = sum;
  __syncthreads();
  // Writes the zeros up to center_stride() too.
  if (warp != 0 || d >= stride) return;
  for (int w = 1; w < kWarps; ++w) sum += sums[w][lane];
  centers[task * stride + d] = sum;
}

// A row, the center of its task or null, and |row - center|^2. A warp owns a row; sums in acc_t.
template <typename scalar_t>
__device__ acc_t<scalar_t> squared_norm(const scalar_t* row, const acc_t<scalar_t>* center,
                                        int64_t features) {
  acc_t<scalar_t> sum = 0;
  for (int64_t d = threadIdx.x % kWarp; d < features; d += kWarp) {
    const auto value = center == nullptr ? widen(row[d]) : widen(row[d]) - center[d];
    sum += value * value;
  }
  return warp_sum(sum);
}

// norms of operands.h: the inverse norms of rows, or with centers the squared norms of differences
// from them; the rows of x [T, Q, D] and then the rows of y [T, N, D]. A warp owns a row; sums in
// acc_t.
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    norms_kernel(PairwiseShape shape, const scalar_t* x, const scalar_t* y,
                 const acc_t<scalar_t>* centers, acc_t<scalar_t>* norms) {
  using value_t = acc_t<scalar_t>;
  const int64_t x_rows = shape.tasks * shape.queries, y_rows = shape.tasks * shape.classes;
  const int64_t r = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (r >= x_rows + y_rows) return;
  const bool is_x = r < x_rows;
  const int64_t own = is_x ? r : r - x_rows, task = own / (is_x ? shape.queries : shape.classes);
  const auto* center =
      centers == nullptr ? nullptr : centers + task * center_stride(shape.features);
  const auto squared = squared_norm((is_x ? x : y) + own * shape.features, center, shape.features);
  if (threadIdx.x % kWarp != 0) return;
  const value_t norm = finish(Metric::kEuclidean, squared), eps = kCosineEps;
  norms[r] = centers != nullptr ? squared : 1 / (norm < eps ? eps : norm);
}

bool needs_centers(const PairwiseOperands& operands) {
  return operands.large_tiles && is_difference(operands.metric);
}

bool needs_norms(const PairwiseOperands& operands) {
  return operands.metric == Metric::kCosine || needs_centers(operands);
}

// Parts of the workspace.
template <typename value_t>
struct NormSpace {
  value_t* centers = nullptr;
  value_t* norms;
  int64_t bytes;

  NormSpace(const PairwiseOperands& operands, void* workspace) {
    const auto& shape = operands.shape;
    Workspace space(workspace);
    if (needs_centers(operands)) {
      centers = space.take<value_t>(shape.tasks * center_stride(shape.features));
    }
    norms = space.take<value_t>(shape.tasks * (shape.queries + shape.classes));
    bytes = space.bytes();
  }
};

template <typename scalar_t>
cudaError_t write_norms(PairwiseOperands& operands, void* workspace, cudaStream_t stream) {
  const auto& shape = operands.shape;
  const NormSpace<acc_t<scalar_t>> space(operands, workspace);
  const auto* x = static_cast<const scalar_t*>(operands.x);
  const auto* y = static_cast<const scalar_t*>(operands.y);
  operands.norms = space.norms;
  operands.centers = space.centers;
  if (space.centers != nullptr) {
    const int64_t blocks = shape.tasks * ceil_div(center_stride(shape.features), kWarp);
    const cudaError_t error = launch(centers_kernel<scalar_t>, blocks, kThreads, 0, stream, y,
                                     shape.classes, shape.features, space.centers);
    if (error != cudaSuccess) return error;
  }
  const int64_t rows = shape.tasks * (shape.queries + shape.classes);
  return launch(norms_kernel<scalar_t>, ceil_div(rows, kWarps), kThreads, 0, stream, shape, x, y,
                space.centers, space.norms);
}

}  // namespace

int64_t row_norms_bytes(const PairwiseOperands& operands) {
  if (!needs_norms(operands)) return 0;
  return with_dtype(operands.dtype, [&](auto type) {
    return NormSpace<acc_t<typename decltype(type)::type>>(operands, nullptr).bytes;
  });
}

int launch_row_norms(PairwiseOperands& operands, void* workspace, void* stream) {
  if (!needs_norms(operands)) return cudaSuccess;
  return with_dtype(operands.dtype, [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    return write_norms<scalar_t>(operands, workspace, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace fastmeta
