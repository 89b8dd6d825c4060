// Meta-loss of a module's own parameters, known to autograd. The forward call computes its gradient
// too and keeps it; `backward` returns it. In C++, because for a small network autograd in Python
// takes longer than the work.
#include <ATen/ops/mul.h>
#include <c10/util/accumulate.h>
#include <c10/util/strides.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <span>
#include <tuple>
#include <vector>

#include "task_program/parameter_arena.h"

namespace fastmeta {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct MetaLossOptions {
  Tensor code, frozen;
  std::vector<double> step_weights;
  int64_t steps;
  bool first_order, keep;
  std::optional<Tensor> support_weight, query_weight;  // without a gradient
};

// Identity whose derivative raises.
struct Once : torch::autograd::Function<Once> {
  static variable_list forward(AutogradContext*, at::TensorList grads) {
    variable_list out;
    for (const auto& grad : grads) out.push_back(grad.clone());
    return out;
  }
  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(
        false,
        "the meta-gradient comes from the adjoint recursion, which keeps no graph: it "
        "cannot be differentiated again. MAML.clone() and adapt() unroll a graph that can.");
  }
};

// Returns the gradients; under create_graph, through a node that raises when it is differentiated.
variable_list differentiable_once(variable_list grads) {
  if (!at::GradMode::is_enabled()) return grads;
  variable_list present;
  for (const auto& grad : grads) {
    if (grad.defined()) present.push_back(grad.detach().requires_grad_());
  }
  if (present.empty()) return grads;
  const auto marked = Once::apply(at::TensorList(present));
  size_t next = 0;
  for (auto& grad : grads) {
    if (grad.defined()) grad = marked[next++];
  }
  return grads;
}

// Views of the arena in the parameters' shapes, which say their number of dimensions first.
void split(const Tensor& arena, at::IntArrayRef shapes, std::span<Tensor> views) {
  int64_t offset = 0;
  for (auto& view : views) {
    const auto shape = shapes.slice(1, shapes.front());
    view = arena.as_strided(shape, c10::contiguous_strides(shape), offset);
    offset += c10::multiply_integers(shape);
    shapes = shapes.slice(1 + shape.size());
  }
}

struct MetaLoss : torch::autograd::Function<MetaLoss> {
  enum Input : size_t { kLr, kSupportX, kSupportY, kQueryX, kQueryY, kParameters };

  static variable_list forward(AutogradContext* ctx, at::TensorList inputs,
                               const MetaLossOptions& o) {
    const auto parameters = inputs.slice(kParameters);
    const bool lr = inputs[kLr].requires_grad(), query = inputs[kQueryX].requires_grad();
    const bool support = inputs[kSupportX].requires_grad() && !o.first_order;
    bool theta = false;
    for (const auto& p : parameters) theta = theta || p.requires_grad();
    auto [loss, outputs, to_theta, to_lr, to_support, to_query] = meta_gradient_op().call(
        o.code, joined(parameters), o.frozen, inputs[kLr], inputs[kSupportX], inputs[kSupportY],
        inputs[kQueryX], inputs[kQueryY], o.step_weights, o.steps, o.first_order, o.keep,
        theta || lr || query || support, lr, support, query, o.support_weight, o.query_weight);
    ctx->save_for_backward({theta ? to_theta : Tensor(), lr ? to_lr : Tensor(),
                            support ? to_support : Tensor(), query ? to_query : Tensor()});
    std::vector<int64_t> shapes;  // of each parameter: its number of dimensions and its sizes
    for (const auto& p : parameters) {
      shapes.push_back(p.dim());
      shapes.insert(shapes.end(), p.sizes().begin(), p.sizes().end());
    }
    ctx->saved_data["shapes"] = std::move(shapes);
    ctx->saved_data["parameters"] = static_cast<int64_t>(parameters.size());
    ctx->set_materialize_grads(false);
    ctx->mark_non_differentiable({outputs});
    return {loss, outputs};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const size_t count = ctx->saved_data["parameters"].toInt();
    variable_list grads(kParameters + count + 1);  // and one for the options
    if (!grad_outputs[0].defined()) return grads;
    {
      // Neither the products nor the views are recorded, not even under create_graph.
      const at::AutoDispatchBelowADInplaceOrView unrecorded;
      const auto saved = ctx->get_saved_variables();
      const Input places[] = {kParameters, kLr, kSupportX, kQueryX};
      for (size_t i = 0; i < saved.size(); ++i) {
        if (saved[i].defined()) grads[places[i]] = saved[i].mul(grad_outputs[0]);
      }
      if (const Tensor arena = grads[kParameters]; arena.defined()) {
        const auto shapes = ctx->saved_data["shapes"].toIntVector();
        split(arena, shapes, {grads.data() + kParameters, count});
      }
    }
    return differentiable_once(std::move(grads));
  }
};

std::tuple<Tensor, Tensor> meta_loss(
    const Tensor& code, at::TensorList parameters, const Tensor& frozen, const Tensor& lr,
    const Tensor& support_x, const Tensor& support_y, const Tensor& query_x, const Tensor& query_y,
    at::ArrayRef<double> step_weights, int64_t steps, bool first_order, bool keep,
    const std::optional<Tensor>& support_weight, const std::optional<Tensor>& query_weight) {
  TORCH_CHECK(!parameters.empty(), "parameters: expected at least one tensor, got none");
  variable_list inputs{lr, support_x, support_y, query_x, query_y};
  inputs.insert(inputs.end(), parameters.begin(), parameters.end());
  const MetaLossOptions options{code,        frozen, step_weights.vec(), steps,
                                first_order, keep,   support_weight,     query_weight};
  const auto results = MetaLoss::apply(at::TensorList(inputs), options);
  return {results[0], results[1]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> loss_and_gradient(
    const Tensor& code, at::TensorList parameters, const Tensor& frozen, const Tensor& lr,
    const Tensor& support_x, const Tensor& support_y, const Tensor& query_x, const Tensor& query_y,
    at::ArrayRef<double> step_weights, int64_t steps, bool first_order, bool keep, bool lr_grad,
    const std::optional<Tensor>& support_weight, const std::optional<Tensor>& query_weight) {
  TORCH_CHECK(!parameters.empty(), "parameters: expected at least one tensor, got none");
  const at::AutoDispatchBelowAutograd below;
  auto [loss, outputs, to_theta, to_lr, to_support, to_query] = meta_gradient_op().call(
      code, joined(parameters), frozen, lr, support_x, support_y, query_x, query_y, step_weights,
      steps, first_order, keep, true, lr_grad, false, false, support_weight, query_weight);
  return {loss, outputs, to_theta, to_lr};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastmeta, CompositeImplicitAutograd, m) {
  m.impl("task_program_loss_and_gradient", &loss_and_gradient);
  m.impl("task_program_meta_loss", &meta_loss);
}

}  // namespace fastmeta
