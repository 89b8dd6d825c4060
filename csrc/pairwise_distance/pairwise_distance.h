// Distances between every row of x and every row of y, for every task; smaller is nearer.
//
//   sqeuclidean   sum_d (x_d - y_d)^2           euclidean   its square root
//   cosine        1 - x.y / (max(|x|, eps) max(|y|, eps))      dot   -x.y
//
// x [T, Q, D], y [T, N, D] -> [T, Q, N], all contiguous. Squared differences are summed directly:
// |x|^2 + |y|^2 - 2 x.y would lose every digit of a distance that is small beside the norms. Large
// arrays on a GPU take this form only if it keeps the digits (large_tile.cuh).
//
// Gradient, for upstream g [Q, N], as weighted sums with W [Q, N] (one matrix product each):
//   sqeuclidean W = -2 g, euclidean W = -g / distance (0 at distance 0):
//       grad_x_i = sum_j W_ij (y_j - x_i)         grad_y_j = sum_i W_ij (x_i - y_j)
//   dot, cosine (on normalised rows) W = -g:
//       grad_x_i = sum_j W_ij y_j                 grad_y_j = sum_i W_ij x_i
//   cosine, back through a = x / max(|x|, eps):   grad_x = (grad_a - a (a.grad_a)) / |x|,
//       grad_a / eps where |x| <= eps
#pragma once

#include <cmath>
#include <cstdint>
#include <optional>
#include <string_view>
#include <type_traits>

#include "common/dtype.h"
#include "common/host_device.h"

namespace fastmeta {

enum class Metric { kSqeuclidean, kEuclidean, kCosine, kDot };

inline constexpr double kCosineEps = 1e-8;

inline std::optional<Metric> metric_named(std::string_view name) {
  if (name == "sqeuclidean") return Metric::kSqeuclidean;
  if (name == "euclidean") return Metric::kEuclidean;
  if (name == "cosine") return Metric::kCosine;
  if (name == "dot") return Metric::kDot;
  return std::nullopt;
}

// Calls body(std::integral_constant<Metric, m>) for the metric m: branches once, outside loops.
template <typename Body>
void with_metric(Metric metric, const Body& body) {
  switch (metric) {
    case Metric::kSqeuclidean:
      return body(std::integral_constant<Metric, Metric::kSqeuclidean>{});
    case Metric::kEuclidean:
      return body(std::integral_constant<Metric, Metric::kEuclidean>{});
    case Metric::kCosine:
      return body(std::integral_constant<Metric, Metric::kCosine>{});
    case Metric::kDot:
      return body(std::integral_constant<Metric, Metric::kDot>{});
  }
}

struct PairwiseShape {
  int64_t tasks;
  int64_t queries;
  int64_t classes;
  int64_t features;
};

FASTMETA_HOST_DEVICE constexpr bool is_difference(Metric metric) {
  return metric == Metric::kSqeuclidean || metric == Metric::kEuclidean;
}

// Share of one feature in a distance, for a number or a vector of them.
struct DifferenceTerm {
  template <typename value_t>
  FASTMETA_HOST_DEVICE static value_t add(value_t sum, value_t x, value_t y) {
    const value_t difference = x - y;
    return sum + difference * difference;
  }
};

struct ProductTerm {
  template <typename value_t>
  FASTMETA_HOST_DEVICE static value_t add(value_t sum, value_t x, value_t y) {
    return sum + x * y;
  }
};

// Distance from the sum over features of DifferenceTerm or ProductTerm.
template <typename value_t>
FASTMETA_HOST_DEVICE inline value_t finish(Metric metric, value_t sum) {
  using std::sqrt;
  switch (metric) {
    case Metric::kSqeuclidean:
      return sum;
    case Metric::kEuclidean:
      return sqrt(sum);
    case Metric::kCosine:
      return value_t(1) - sum;
    case Metric::kDot:
      return -sum;
  }
  return sum;
}

// W of the gradient formulas: upstream times the derivative of the distance in its inner sum.
template <typename value_t>
FASTMETA_HOST_DEVICE inline value_t gradient_weight(Metric metric, value_t upstream,
                                                    value_t distance) {
  switch (metric) {
    case Metric::kSqeuclidean:
      return -2 * upstream;
    case Metric::kEuclidean:
      return distance == 0 ? value_t(0) : -upstream / distance;
    case Metric::kCosine:
    case Metric::kDot:
      return -upstream;
  }
  return upstream;
}

// CUDA launchers: device pointers, workspace of as many bytes as the function before returns,
// result a cudaError_t. The backward needs at least one distance and one feature.
struct PairwiseOperands {
  Dtype dtype;
  Metric metric;
  PairwiseShape shape;
  const void* x;
  const void* y;
  // For the launchers' own use (operands.h):
  bool large_tiles = false;
  const void* norms = nullptr;
  const void* centers = nullptr;
};

int64_t pairwise_distance_workspace(const PairwiseOperands& operands);
int launch_pairwise_distance(PairwiseOperands operands, void* distance, void* workspace,
                             void* stream);

int64_t pairwise_distance_backward_workspace(const PairwiseOperands& operands);
int launch_pairwise_distance_backward(PairwiseOperands operands, const void* grad_distance,
                                      void* grad_x, void* grad_y, void* workspace, void* stream);

}  // namespace fastmeta
