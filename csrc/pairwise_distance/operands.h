// Preparation of operands, shared by the CUDA ops that compare rows of x with rows of y.
#pragma once

#include "common/ceil_div.h"
#include "pairwise_distance/pairwise_distance.h"

namespace fastmeta {

// `rows` rows of x of each of `tasks` tasks, all rows unless tasks is 1.
struct Chunk {
  int64_t first_task, tasks, first_row, rows;
};

inline Chunk whole(const PairwiseShape& shape) { return {0, shape.tasks, 0, shape.queries}; }

// Distance between the centers of two tasks: features and zeros up to whole slices of a tile, one
// slice at least.
FASTMETA_HOST_DEVICE constexpr int64_t center_stride(int64_t features) {
  constexpr int64_t kPadded = 16;
  return (features / kPadded + 1) * kPadded;
}

// Enqueues the kernels that prepare rows for tiles, and points operands at their results. Returns a
// cudaError_t.
// cosine                          norms[r] = 1 / max(|row r|, eps)
// differences, in large tiles     centers[t] near the rows of y[t], norms[r] = |row r - center|^2
// The T Q rows of x and then the T N of y, in the accumulation type. Other metrics and tiles need
// none.
int64_t row_norms_bytes(const PairwiseOperands& operands);
int launch_row_norms(PairwiseOperands& operands, void* workspace, void* stream);

}  // namespace fastmeta
