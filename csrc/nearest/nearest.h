// The k nearest rows of y to every row of x, for every task, nearest first.
//
//   indices[t, q]   = the k numbers n of the smallest d(x[t, q], y[t, n])
//   distances[t, q] = these d, of pairwise_distance.h
//
// x [T, Q, D], y [T, N, D], present [T, N] -> [T, Q, k], all contiguous, 1 <= k <= N. Equal
// distances stay in the order of their indices, and NaN comes after all numbers. A row of y that is
// not present comes after all: its index is -1, its distance infinite. [Q, N] exists a tile at a
// time, so memory beyond inputs and outputs is O(N D).
#pragma once

#include <cstdint>

#include "common/absent.h"
#include "common/host_device.h"
#include "pairwise_distance/operands.h"

namespace fastmeta {

// A row of y and its distance, or the square of it.
template <typename value_t>
struct Neighbour {
  value_t distance;
  int64_t index;

  // The order of neighbours: total, as no two have one index.
  FASTMETA_HOST_DEVICE bool is_before(const Neighbour& other) const {
    if (distance < other.distance) return true;
    if (distance > other.distance) return false;
    const bool is_nan = distance != distance, other_is_nan = other.distance != other.distance;
    return is_nan == other_is_nan ? index < other.index : other_is_nan;
  }
};

// The metric that has the order of another, without a root or a difference that rounds numbers to
// the same one.
FASTMETA_HOST_DEVICE constexpr Metric ordered_by(Metric metric) {
  return is_difference(metric) ? Metric::kSqeuclidean : Metric::kDot;
}

// The distance by `metric`, from the one by ordered_by(metric).
template <typename value_t>
FASTMETA_HOST_DEVICE inline value_t finish_ordered(Metric metric, value_t distance) {
  return finish(metric, is_difference(metric) ? distance : -distance);
}

// CUDA launcher: device pointers, at least one query, 1 <= k <= N, workspace of as many bytes as the
// function before returns, result a cudaError_t.
struct NearestOperands {
  PairwiseOperands pairwise;
  const bool* present;  // [T, N], or null for all of them
  int64_t k;
};

int64_t nearest_workspace(const NearestOperands& operands);
int launch_nearest(NearestOperands operands, void* distances, int64_t* indices, void* workspace,
                   void* stream);

}  // namespace fastmeta
