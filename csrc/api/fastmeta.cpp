// C++ functions of fastmeta.h: each calls the op of its name through PyTorch's dispatcher.
#include "api/fastmeta.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/full.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cstddef>
#include <string>
#include <type_traits>

#include "common/check.h"
#include "common/cpu/kept_pages.h"
#include "common/cpu/workspace.h"

namespace fastmeta {
namespace {

using at::Tensor;

template <size_t size>
struct Name {
  constexpr Name(const char (&text)[size]) { std::copy_n(text, size, value); }
  char value[size];
};

// Parameter type of a kernel: tensors by reference, all else by value.
template <typename T>
constexpr bool is_tensor = std::is_same_v<T, Tensor> || std::is_same_v<T, std::optional<Tensor>>;
template <typename T>
using Argument = std::conditional_t<is_tensor<T>, const T&, T>;

bool requires_grad(const Tensor& x) { return x.requires_grad(); }
bool requires_grad(const std::optional<Tensor>& x) { return x && x->requires_grad(); }
template <typename T>
bool requires_grad(const T&) {
  return false;
}

template <Name name, typename Result, typename... Arguments>
Result call(const Arguments&... arguments) {
  TORCH_CHECK(!c10::GradMode::is_enabled() || !(requires_grad(arguments) || ...),
              "fastmeta::", name.value,
              " is not recorded by autograd: give it tensors that require no gradient, ",
              "or call it under c10::NoGradGuard");
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow((std::string("fastmeta::") + name.value).c_str(), "")
          .template typed<Result(Argument<Arguments>...)>();
  return op.call(arguments...);
}

}  // namespace

std::string_view isa() { return FASTMETA_ISA; }

int64_t release_memory() { return release_workspaces() + release_pages(); }

Tensor inner_update(const Tensor& params, const Tensor& grads, const Tensor& lr) {
  return call<"inner_update", Tensor>(params, grads, lr);
}

Tensor inner_update(const Tensor& params, const Tensor& grads, double lr) {
  return inner_update(params, grads, at::full({1, 1}, lr, wide_options(params)));
}

std::tuple<Tensor, Tensor> inner_update_backward(const Tensor& grad_out, const Tensor& grads,
                                                 const Tensor& lr) {
  return call<"inner_update_backward", std::tuple<Tensor, Tensor>>(grad_out, grads, lr);
}

Tensor prototypes(const Tensor& x, const Tensor& labels, int64_t classes) {
  return call<"prototypes", Tensor>(x, labels, classes);
}

Tensor prototypes_backward(const Tensor& grad_prototypes, const Tensor& labels) {
  return call<"prototypes_backward", Tensor>(grad_prototypes, labels);
}

Tensor pairwise_distance(const Tensor& x, const Tensor& y, std::string_view metric) {
  return call<"pairwise_distance", Tensor>(x, y, metric);
}

std::tuple<Tensor, Tensor> pairwise_distance_backward(const Tensor& grad_distance, const Tensor& x,
                                                      const Tensor& y, std::string_view metric) {
  return call<"pairwise_distance_backward", std::tuple<Tensor, Tensor>>(grad_distance, x, y,
                                                                        metric);
}

std::tuple<Tensor, Tensor> nearest(const Tensor& x, const Tensor& y, int64_t k,
                                   std::string_view metric, const std::optional<Tensor>& present) {
  return call<"nearest", std::tuple<Tensor, Tensor>>(x, y, present, k, metric);
}

Tensor prototype_loss(const Tensor& query, const Tensor& labels, const Tensor& prototypes,
                      std::string_view metric, double scale) {
  return call<"prototype_loss", Tensor>(query, labels, prototypes, metric, scale);
}

std::tuple<Tensor, Tensor, Tensor> prototype_loss_backward(const Tensor& weight,
                                                           const Tensor& query,
                                                           const Tensor& labels,
                                                           const Tensor& prototypes,
                                                           std::string_view metric, double scale) {
  return call<"prototype_loss_backward", std::tuple<Tensor, Tensor, Tensor>>(
      weight, query, labels, prototypes, metric, scale);
}

AdaptedHead linear_head(const Tensor& x, const Tensor& targets, const Tensor& weight,
                        const std::optional<Tensor>& bias, const Tensor& lr,
                        const HeadOptions& options) {
  auto [head_weight, head_bias, predictions, products] =
      call<"linear_head", std::tuple<Tensor, Tensor, Tensor, Tensor>>(
          x, targets, weight, bias, lr, options.loss, options.weight_decay, options.dual);
  return {head_weight, head_bias, predictions, products};
}

HeadDerivatives linear_head_backward(const Tensor& grad_weight, const Tensor& grad_bias,
                                     const AdaptedHead& adapted, const Tensor& x,
                                     const Tensor& targets, const Tensor& weight,
                                     const std::optional<Tensor>& bias, const Tensor& lr,
                                     const HeadOptions& options,
                                     const HeadGradientOptions& gradient_options) {
  auto [grad_x, grad_targets, grad_start, grad_start_bias, grad_lr] =
      call<"linear_head_backward", std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>>(
          grad_weight, grad_bias, x, targets, weight, bias, lr, adapted.predictions,
          adapted.products, options.loss, options.weight_decay, options.dual,
          gradient_options.first_order, gradient_options.input_grad);
  return {grad_x, grad_targets, grad_start, grad_start_bias, grad_lr};
}

HeadMetaLoss linear_head_loss(const Tensor& x, const Tensor& targets, const Tensor& weight,
                              const std::optional<Tensor>& bias, const Tensor& lr,
                              const Tensor& query, const Tensor& query_targets,
                              const HeadOptions& options,
                              const HeadGradientOptions& gradient_options) {
  using Results =
      std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
  auto [loss, outputs, grad_x, grad_targets, grad_weight, grad_bias, grad_lr, grad_query,
        grad_query_targets] =
      call<"linear_head_loss", Results>(x, targets, weight, bias, lr, query, query_targets,
                                        options.loss, options.weight_decay, options.dual,
                                        gradient_options.first_order, gradient_options.input_grad);
  return {loss,
          outputs,
          {grad_x, grad_targets, grad_weight, grad_bias, grad_lr},
          grad_query,
          grad_query_targets};
}

}  // namespace fastmeta
