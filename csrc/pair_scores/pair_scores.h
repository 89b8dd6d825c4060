// Scores of all pairs of rows by the output layer of a small network, and their derivatives.
// With u = x[t, q, h] + y[t, n, h], sums over h where they are not named, and an upstream gradient g:
//
//   scores[t, q, n]      = bias[t] + sum weight[t, h] phi(u)
//
//   grad_x[t, q, h]      = weight[t, h] sum_n g phi'(u), grad_y alike with sum_q
//   grad_weight[t, h]    = sum_qn g phi(u),   grad_bias[t] = sum_qn g
//
// and with a direction u_dot = x_dot[t, q, h] + y_dot[t, n, h], weight_dot, bias_dot:
//
//   scores_dot[t, q, n]  = bias_dot[t] + sum (weight_dot phi(u) + weight phi'(u) u_dot)
//
//   x: sum_n g (weight_dot phi'(u) + weight phi''(u) u_dot), y alike with sum_q,
//   weight: sum_qn g phi'(u) u_dot                       the gradient's derivative for a constant g
//
// x [T, Q, H], y [T, N, H], weight [T, H], bias [T]. weight, bias, their gradients and all sums are
// float for bfloat16 and half. Sums have one order.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

#include "common/dtype.h"
#include "common/host_device.h"
#include "execution/math.h"

namespace fastmeta {

struct PairScoresShape {
  int64_t tasks;
  int64_t queries;
  int64_t classes;
  int64_t features;
};

enum class PairActivation { kRelu, kTanh, kSilu, kAbs };

inline std::optional<PairActivation> pair_activation_named(std::string_view name) {
  if (name == "relu") return PairActivation::kRelu;
  if (name == "tanh") return PairActivation::kTanh;
  if (name == "silu") return PairActivation::kSilu;
  if (name == "abs") return PairActivation::kAbs;
  return std::nullopt;
}

// phi and its derivatives; phi'(0) is 0 for relu and abs. Those that are needed together are
// computed together, as they share an exponential.
template <PairActivation kind>
struct Phi {
  static constexpr bool kBends = kind == PairActivation::kTanh || kind == PairActivation::kSilu;

  template <typename number_t>
  FASTMETA_HOST_DEVICE static number_t value(const number_t& u) {
    using M = Math<number_t>;
    if constexpr (kind == PairActivation::kRelu) return M::if_less(u, number_t(0), number_t(0), u);
    if constexpr (kind == PairActivation::kTanh) return M::tanh(u);
    if constexpr (kind == PairActivation::kSilu) return u * M::sigmoid(u);
    if constexpr (kind == PairActivation::kAbs) return M::abs(u);
  }

  // value = phi(u), along = g phi'(u); 0 where phi' is 0, also for a g that is not finite.
  template <typename number_t>
  FASTMETA_HOST_DEVICE static void with_slope(const number_t& u, const number_t& g, number_t& value,
                                              number_t& along) {
    using M = Math<number_t>;
    const number_t zero(0), one(1);
    if constexpr (kind == PairActivation::kTanh) {
      value = M::tanh(u);
      along = g * (one - value * value);
    } else if constexpr (kind == PairActivation::kSilu) {
      const number_t s = M::sigmoid(u);
      value = u * s;
      along = g * (s * (one + u * (one - s)));
    } else {
      value = Phi::value(u);
      along = M::if_less(zero, u, g, zero);
      if constexpr (kind == PairActivation::kAbs) along = M::if_less(u, zero, zero - g, along);
    }
  }

  // slope = phi'(u), bend = phi''(u).
  template <typename number_t>
  FASTMETA_HOST_DEVICE static void with_bend(const number_t& u, number_t& slope, number_t& bend) {
    using M = Math<number_t>;
    const number_t one(1), two(2);
    bend = number_t(0);
    if constexpr (kind == PairActivation::kTanh) {
      const number_t t = M::tanh(u);
      slope = one - t * t;
      bend = number_t(-2) * t * slope;
    } else if constexpr (kind == PairActivation::kSilu) {
      const number_t s = M::sigmoid(u), rest = s * (one - s);
      slope = s * (one + u * (one - s));
      bend = rest * (two + u * (one - two * s));
    } else {
      number_t value(0);
      with_slope(u, one, value, slope);
    }
  }
};

// Term of a feature in a score, and in its tangent. Directions are not read without one.
template <typename Phi>
struct ScoreTerm {
  static constexpr bool kHasDirection = false;
  template <typename number_t>
  FASTMETA_HOST_DEVICE static number_t of(const number_t& u, const number_t&,
                                          const number_t& weight, const number_t&) {
    return weight * Phi::value(u);
  }
};

template <typename Phi>
struct TangentTerm {
  static constexpr bool kHasDirection = true;
  template <typename number_t>
  FASTMETA_HOST_DEVICE static number_t of(const number_t& u, const number_t& u_dot,
                                          const number_t& weight, const number_t& weight_dot) {
    number_t value(0), along(0);
    Phi::with_slope(u, weight * u_dot, value, along);
    return weight_dot * value + along;
  }
};

// Share of a pair in the gradients of its rows and of the weight, and in their tangents. The first
// is the same for both rows, and lacks the factor weight if kNeedsWeight: it is put in at the end.
template <typename Phi>
struct GradientShare {
  static constexpr bool kHasDirection = false, kNeedsWeight = true;
  template <typename number_t>
  FASTMETA_HOST_DEVICE static void of(const number_t& g, const number_t& u, const number_t&,
                                      const number_t&, const number_t&, number_t& of_rows,
                                      number_t& of_weight) {
    number_t value(0);
    Phi::with_slope(u, g, value, of_rows);
    of_weight = g * value;
  }
};

template <typename Phi>
struct BendShare {
  static constexpr bool kHasDirection = true, kNeedsWeight = false;
  template <typename number_t>
  FASTMETA_HOST_DEVICE static void of(const number_t& g, const number_t& u, const number_t& u_dot,
                                      const number_t& weight, const number_t& weight_dot,
                                      number_t& of_rows, number_t& of_weight) {
    number_t slope(0), bend(0);
    Phi::with_bend(u, slope, bend);
    of_rows = weight_dot * slope;
    if constexpr (Phi::kBends) of_rows = of_rows + weight * bend * u_dot;
    of_rows = g * of_rows;
    of_weight = g * (slope * u_dot);
  }
};

// Calls body(Phi<kind>()) for the kind, as a constant.
template <typename Body>
auto with_phi(PairActivation kind, const Body& body) {
  switch (kind) {
    case PairActivation::kTanh:
      return body(Phi<PairActivation::kTanh>());
    case PairActivation::kSilu:
      return body(Phi<PairActivation::kSilu>());
    case PairActivation::kAbs:
      return body(Phi<PairActivation::kAbs>());
    case PairActivation::kRelu:
      break;
  }
  // Behind the switch, so that every path returns.
  return body(Phi<PairActivation::kRelu>());
}

// Arrays of a call, contiguous; without a direction its three are null.
struct PairScoresOperands {
  Dtype dtype;
  PairActivation activation;
  PairScoresShape shape;
  const void *x, *y, *weight;
  const void *x_dot, *y_dot, *weight_dot;
};

// CUDA launchers: device pointers, result a cudaError_t; at least one task, query and class.
// Scores, or with a direction their tangent, whose bias is then bias_dot.
int launch_pair_sums(const PairScoresOperands& operands, const void* bias, void* sums,
                     void* stream);
// Gradients, or with a direction their tangents; workspace of as many bytes. Features may be 0.
int64_t pair_gradient_workspace(const PairScoresOperands& operands);
int launch_pair_gradient(const PairScoresOperands& operands, const void* grad_scores, void* grad_x,
                         void* grad_y, void* grad_weight, void* grad_bias, void* workspace,
                         void* stream);

}  // namespace fastmeta
