// CPU implementation of linear_head: a thread a task.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "common/cpu/denormals.h"
#include "common/cpu/parallel.h"
#include "linear_head/arguments_cpu.h"

namespace fastmeta {
namespace {

template <typename value_t>
HeadKept<value_t> kept_of(const HeadArguments& a, const at::Tensor& predictions,
                          const at::Tensor& products, int64_t t) {
  const auto part = [t](const at::Tensor& x) {
    // HeadKept is written forward and read backward: one type serves both.
    return const_cast<value_t*>(x.const_data_ptr<value_t>()) +
           (x.numel() == 0 ? 0 : t * (x.numel() / x.size(0)));
  };
  return {part(predictions), part(products)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_head_cpu(
    const at::Tensor& x, const at::Tensor& targets, const at::Tensor& weight,
    const std::optional<at::Tensor>& bias, const at::Tensor& lr, std::string_view loss,
    double weight_decay, bool dual) {
  const HeadArguments a = checked_head(x, targets, weight, bias, lr, loss, weight_decay, dual);
  const auto& s = a.shape;
  auto out_weight = at::empty({s.tasks, s.ways, s.features}, x.options());
  auto out_bias = at::empty({s.tasks, bias ? s.ways : 0}, x.options());
  auto predictions = at::empty(predictions_shape(s), wide_options(x));
  auto products = at::empty(products_shape(s, dual), wide_options(x));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "linear_head", [&] {
    auto* weights = out_weight.mutable_data_ptr<scalar_t>();
    auto* biases = out_bias.mutable_data_ptr<scalar_t>();
    parallel_for(0, s.tasks, 1, [&](int64_t begin, int64_t end) {
      const FlushDenormals flush;
      using value_t = acc_t<scalar_t>;
      CpuHead<value_t> head(s, a.options);
      HeadInputs<scalar_t> inputs(s);
      // Once a thread, for all of its tasks.
      WideArray<scalar_t> new_weight(s.ways * s.features), new_bias(s.ways);
      for (int64_t t = begin; t < end; ++t) {
        scalar_t* w = weights + t * s.ways * s.features;
        scalar_t* b = bias ? biases + t * s.ways : nullptr;
        head.forward(inputs.read(a.task<scalar_t>(t)),
                     kept_of<value_t>(a, predictions, products, t), new_weight.target(w),
                     new_bias.target(b));
        new_weight.write(w);
        new_bias.write(b);
      }
    });
  });
  return {out_weight, out_bias, predictions, products};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_head_backward_cpu(
    const at::Tensor& grad_weight, const at::Tensor& grad_bias, const at::Tensor& x,
    const at::Tensor& targets, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    const at::Tensor& lr, const at::Tensor& predictions, const at::Tensor& products,
    std::string_view loss, double weight_decay, bool dual, bool first_order, bool input_grad) {
  const HeadArguments a = checked_head(x, targets, weight, bias, lr, loss, weight_decay, dual);
  const auto& s = a.shape;
  check_head_upstream(grad_weight, grad_bias, x, s, a.options.has_bias);
  check_head_kept(predictions, products, x, s, dual);
  const auto upstream_weight = grad_weight.contiguous(), upstream_bias = grad_bias.contiguous();
  const auto kept_predictions = predictions.contiguous(), kept_products = products.contiguous();
  // To first order nothing reaches x, see linear_head.h.
  const bool has_x = input_grad && !first_order;
  auto out = empty_head_gradients(x, s, a.options, has_x);
  const auto& grad_lr = std::get<4>(out);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, x.scalar_type(), "linear_head_backward", [&] {
        using value_t = acc_t<scalar_t>;
        parallel_for(0, s.tasks, 1, [&](int64_t begin, int64_t end) {
          const FlushDenormals flush;
          CpuHead<value_t> head(s, a.options);
          HeadInputs<scalar_t> inputs(s);
          HeadOutputs<scalar_t> outputs(s, has_x);
          WideArray<scalar_t> upstream_w(s.ways * s.features), upstream_b(s.ways);
          for (int64_t t = begin; t < end; ++t) {
            const auto to = head_gradients_of<scalar_t>(out, t);
            const auto* v = upstream_weight.const_data_ptr<scalar_t>() + t * s.ways * s.features;
            const auto* v_bias = a.options.has_bias
                                     ? upstream_bias.const_data_ptr<scalar_t>() + t * s.ways
                                     : nullptr;
            head.backward(inputs.read(a.task<scalar_t>(t)),
                          kept_of<value_t>(a, kept_predictions, kept_products, t),
                          upstream_w.read(v), upstream_b.read(v_bias), first_order,
                          outputs.targets(to, grad_lr.mutable_data_ptr<value_t>() + t * s.steps));
            outputs.write(to);
          }
        });
      });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastmeta, CPU, m) {
  m.impl("linear_head", &linear_head_cpu);
  m.impl("linear_head_backward", &linear_head_backward_cpu);
}

}  // namespace fastmeta
