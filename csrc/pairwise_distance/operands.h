// What the CUDA ops that compare rows of x with rows of y do to their operands alike.
#pragma once

#include "pairwise_distance/pairwise_distance.h"

namespace fastmeta {

// `rows` rows of x of each of `tasks` tasks, all rows unless tasks is 1.
struct Chunk {
  int64_t first_task, tasks, first_row, rows;
};

inline Chunk whole(const PairwiseShape& shape) { return {0, shape.tasks, 0, shape.queries}; }

// Cosine: enqueues inverse_norms[r] = 1 / max(|row r|, eps), the T Q rows of x and then the T N of
// y, in the accumulation type, and points operands there. Other metrics need none. A cudaError_t.
int64_t inverse_norms_bytes(const PairwiseOperands& operands);
int launch_inverse_norms(PairwiseOperands& operands, void* inverse_norms, void* stream);

}  // namespace fastmeta
