// CPU implementation of pair_scores.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>

#include "common/cpu/parallel.h"
#include "pair_scores/gradient_cpu.h"
#include "pair_scores/pair_scores_ops.h"
#include "pair_scores/sums_cpu.h"

namespace fastmeta {
namespace {

// Calls body(ScalarType, Phi) for the dtype and the activation of a call, as types.
template <typename Body>
void with_types(const PairScoresArrays& arrays, const Body& body) {
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, arrays.x.scalar_type(), "pair_scores",
      [&] { with_phi(arrays.activation, [&](auto phi) { body(scalar_t(0), phi); }); });
}

template <typename Term, typename scalar_t>
void write_sums(const PairScoresArrays& arrays, const at::Tensor& bias, at::Tensor& out) {
  const auto& shape = arrays.shape;
  const auto* of_task = bias.const_data_ptr<acc_t<scalar_t>>();
  auto* target = out.mutable_data_ptr<scalar_t>();
  for_each_task_range(shape.tasks, [&](int64_t begin, int64_t end) {
    PairPoints<scalar_t> points(arrays.operands());
    for (int64_t t = begin; t < end; ++t) {
      sums_of_task<Term>(shape, points.of_task(t), of_task[t],
                         target + t * shape.queries * shape.classes);
    }
  });
}

template <typename Share, typename scalar_t>
void write_gradients(const PairScoresArrays& arrays, const at::Tensor& upstream,
                     PairScoresGradients& grads) {
  const auto& shape = arrays.shape;
  const auto* g = upstream.const_data_ptr<scalar_t>();
  auto* of_x = grads.x.mutable_data_ptr<scalar_t>();
  auto* of_y = grads.y.mutable_data_ptr<scalar_t>();
  auto* of_weight = grads.weight.mutable_data_ptr<acc_t<scalar_t>>();
  auto* of_bias = grads.bias.mutable_data_ptr<acc_t<scalar_t>>();
  for_each_task_range(shape.tasks, [&](int64_t begin, int64_t end) {
    PairPoints<scalar_t> points(arrays.operands());
    PairScoresGradient<scalar_t, Share> gradient(shape);
    for (int64_t t = begin; t < end; ++t) {
      gradient.run(points.of_task(t), g + t * shape.queries * shape.classes,
                   of_x + t * shape.queries * shape.features,
                   of_y + t * shape.classes * shape.features, of_weight + t * shape.features,
                   of_bias + t);
    }
  });
}

struct OnCpu {
  static at::Tensor sums(const PairScoresArrays& arrays, const at::Tensor& bias) {
    const auto& shape = arrays.shape;
    auto out = at::empty({shape.tasks, shape.queries, shape.classes}, arrays.x.options());
    if (out.numel() == 0) return out;
    with_types(arrays, [&](auto number, auto phi) {
      using scalar_t = decltype(number);
      using Phi = decltype(phi);
      arrays.x_dot.defined() ? write_sums<TangentTerm<Phi>, scalar_t>(arrays, bias, out)
                             : write_sums<ScoreTerm<Phi>, scalar_t>(arrays, bias, out);
    });
    return out;
  }

  static PairScoresGradients gradients(const PairScoresArrays& arrays, const at::Tensor& upstream) {
    auto grads = PairScoresGradients::zeros(arrays);
    if (upstream.numel() == 0) return grads;
    with_types(arrays, [&](auto number, auto phi) {
      using scalar_t = decltype(number);
      using Phi = decltype(phi);
      arrays.x_dot.defined()
          ? write_gradients<BendShare<Phi>, scalar_t>(arrays, upstream, grads)
          : write_gradients<GradientShare<Phi>, scalar_t>(arrays, upstream, grads);
    });
    return grads;
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(fastmeta, CPU, m) { register_pair_scores<OnCpu>(m); }

}  // namespace fastmeta
