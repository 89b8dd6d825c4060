// CPU implementation of linear_head: a thread a task.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "common/denormals.h"
#include "common/labels.h"
#include "linear_head/check.h"
#include "linear_head/cpu_head.h"

namespace fastmeta {
namespace {

// An array of each task as acc_t: in place where it has that type.
template <typename scalar_t>
class Wide {
 public:
  explicit Wide(int64_t count) : count_(count), scratch_(is_reduced<scalar_t> ? count : 0) {}

  const acc_t<scalar_t>* read(const scalar_t* source) {
    return source == nullptr ? nullptr : widen(source, scratch_.data(), count_);
  }
  acc_t<scalar_t>* target(scalar_t* target) {
    return target == nullptr ? nullptr : widened_target(target, scratch_.data());
  }
  void write(scalar_t* target) {
    if constexpr (is_reduced<scalar_t>) {
      if (target != nullptr) narrow(scratch_.data(), target, count_);
    }
  }

 private:
  int64_t count_;
  Buffer<acc_t<scalar_t>> scratch_;
};

template <typename scalar_t>
struct Task {
  const scalar_t *x, *weight, *bias, *targets;
  const int64_t* labels;
  const acc_t<scalar_t>* lr;
};

template <typename scalar_t>
class Inputs {
 public:
  explicit Inputs(const LinearHeadShape& s)
      : x_(s.support * s.features),
        weight_(s.ways * s.features),
        bias_(s.ways),
        targets_(s.support * s.ways) {}

  HeadTask<acc_t<scalar_t>> read(const Task<scalar_t>& task) {
    return {x_.read(task.x), weight_.read(task.weight),   bias_.read(task.bias),
            task.lr,         targets_.read(task.targets), task.labels};
  }

 private:
  Wide<scalar_t> x_, weight_, bias_, targets_;
};

struct Arguments {
  LinearHeadShape shape;
  LinearHeadOptions options;
  at::Tensor x, targets, weight, bias, lr;  // tasks contiguous

  template <typename scalar_t>
  Task<scalar_t> task(int64_t t) const {
    const auto& s = shape;
    const bool has_labels = options.loss != HeadLoss::kMse;
    return {x.const_data_ptr<scalar_t>() + t * s.support * s.features,
            weight.const_data_ptr<scalar_t>() + t * weight.stride(0),
            options.has_bias ? bias.const_data_ptr<scalar_t>() + t * s.ways : nullptr,
            has_labels ? nullptr : targets.const_data_ptr<scalar_t>() + t * s.support * s.ways,
            has_labels ? targets.const_data_ptr<int64_t>() + t * s.support : nullptr,
            lr.const_data_ptr<acc_t<scalar_t>>() + t * s.steps};
  }
};

Arguments checked(const at::Tensor& x, const at::Tensor& targets, const at::Tensor& weight,
                  const std::optional<at::Tensor>& bias, const at::Tensor& lr,
                  std::string_view loss, double weight_decay, bool dual) {
  const HeadLoss kind = checked_head_loss(loss);
  const auto shape = checked_head_shape(x, targets, weight, bias, lr, kind);
  const LinearHeadOptions options{kind, weight_decay, dual, bias.has_value()};
  Arguments a{shape,
              options,
              x.contiguous(),
              targets.contiguous(),
              with_contiguous_tasks(weight),
              bias ? bias->contiguous() : at::Tensor(),
              lr.contiguous()};
  if (kind != HeadLoss::kMse) check_label_range(a.targets, label_classes(kind, shape), "targets");
  return a;
}

template <typename value_t>
HeadKept<value_t> kept_of(const Arguments& a, const at::Tensor& predictions,
                          const at::Tensor& products, int64_t t) {
  const auto part = [t](const at::Tensor& x) {
    return const_cast<value_t*>(x.const_data_ptr<value_t>()) +
           (x.numel() == 0 ? 0 : t * (x.numel() / x.size(0)));
  };
  return {part(predictions), part(products)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_head_cpu(
    const at::Tensor& x, const at::Tensor& targets, const at::Tensor& weight,
    const std::optional<at::Tensor>& bias, const at::Tensor& lr, std::string_view loss,
    double weight_decay, bool dual) {
  const Arguments a = checked(x, targets, weight, bias, lr, loss, weight_decay, dual);
  const auto& s = a.shape;
  auto out_weight = at::empty({s.tasks, s.ways, s.features}, x.options());
  auto out_bias = at::empty({s.tasks, bias ? s.ways : 0}, x.options());
  auto predictions = at::empty(predictions_shape(s), wide_options(x));
  auto products = at::empty(products_shape(s, dual), wide_options(x));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "linear_head", [&] {
    auto* weights = out_weight.mutable_data_ptr<scalar_t>();
    auto* biases = out_bias.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, s.tasks, 1, [&](int64_t begin, int64_t end) {
      const FlushDenormals flush;
      using value_t = acc_t<scalar_t>;
      CpuHead<value_t> head(s, a.options);
      Inputs<scalar_t> inputs(s);
      Wide<scalar_t> new_weight(s.ways * s.features), new_bias(s.ways);
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

// The gradients of a task where they are written to, and what is on the way there.
template <typename scalar_t>
class Outputs {
 public:
  Outputs(const LinearHeadShape& s, bool has_x)
      : x_(has_x ? s.support * s.features : 0),
        weight_(s.ways * s.features),
        bias_(s.ways),
        targets_(s.support * s.ways) {}

  HeadGradients<acc_t<scalar_t>> targets(const HeadGradients<scalar_t>& to, acc_t<scalar_t>* lr) {
    return {x_.target(to.x), weight_.target(to.weight), bias_.target(to.bias), lr,
            targets_.target(to.targets)};
  }
  void write(const HeadGradients<scalar_t>& to) {
    x_.write(to.x);
    weight_.write(to.weight);
    bias_.write(to.bias);
    targets_.write(to.targets);
  }

 private:
  Wide<scalar_t> x_, weight_, bias_, targets_;
};

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_head_backward_cpu(
    const at::Tensor& grad_weight, const at::Tensor& grad_bias, const at::Tensor& x,
    const at::Tensor& targets, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    const at::Tensor& lr, const at::Tensor& predictions, const at::Tensor& products,
    std::string_view loss, double weight_decay, bool dual, bool first_order, bool input_grad) {
  const Arguments a = checked(x, targets, weight, bias, lr, loss, weight_decay, dual);
  const auto& s = a.shape;
  check_head_upstream(grad_weight, grad_bias, x, s, a.options.has_bias);
  check_head_kept(predictions, products, x, s, dual);
  const auto upstream_weight = grad_weight.contiguous(), upstream_bias = grad_bias.contiguous();
  const auto kept_predictions = predictions.contiguous(), kept_products = products.contiguous();
  const bool has_x = input_grad && !first_order, has_targets = a.options.loss == HeadLoss::kMse;
  auto out = empty_head_gradients(x, s, a.options, has_x);
  auto& [grad_x, grad_targets, grad_w, grad_b, grad_lr] = out;
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, x.scalar_type(), "linear_head_backward", [&] {
        using value_t = acc_t<scalar_t>;
        const auto part = [](const at::Tensor& tensor, int64_t t, int64_t count, bool there) {
          return there ? tensor.mutable_data_ptr<scalar_t>() + t * count : nullptr;
        };
        at::parallel_for(0, s.tasks, 1, [&](int64_t begin, int64_t end) {
          const FlushDenormals flush;
          CpuHead<value_t> head(s, a.options);
          Inputs<scalar_t> inputs(s);
          Outputs<scalar_t> outputs(s, has_x);
          Wide<scalar_t> upstream_w(s.ways * s.features), upstream_b(s.ways);
          for (int64_t t = begin; t < end; ++t) {
            const HeadGradients<scalar_t> to{
                part(grad_x, t, s.support * s.features, has_x),
                part(grad_w, t, s.ways * s.features, true),
                part(grad_b, t, s.ways, a.options.has_bias), nullptr,
                part(grad_targets, t, s.support * s.ways, has_targets)};
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
