// Gradient, on a GPU, of any function of pairwise distances: the weighted sums of
// pairwise_distance.h over W, of which a chunk of bounded size exists at a time (gradient.cu).
#pragma once

#include <functional>

#include "pairwise_distance/operands.h"

namespace fastmeta {

// Enqueues kernels that fill W of a chunk, [tasks, rows, classes] in the accumulation type, at
// `weights`.
using Weigh = std::function<int(const Chunk& chunk, void* weights)>;

// Launchers for at least one task and row of x. Results are cudaError_t.
int64_t pairwise_gradient_workspace(const PairwiseOperands& operands);  // bytes
int launch_pairwise_gradient(const PairwiseOperands& operands, const Weigh& weigh, void* grad_x,
                             void* grad_y, void* workspace, void* stream);

}  // namespace fastmeta
