// CPU implementation of linear_head_loss. A thread owns a task: it takes the inner steps, the loss
// on the queries and all gradients while the task's examples are in its cache.
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

// Workspace of a thread, for the tasks that it takes one by one.
template <typename scalar_t>
class LossWorker {
  using value_t = acc_t<scalar_t>;

 public:
  LossWorker(const HeadArguments& inner, const HeadArguments& outer)
      : s_(inner.shape),
        has_bias_(inner.options.has_bias),
        inner_(inner.shape, inner.options),
        outer_(outer.shape, outer.options),
        predictions_(s_.steps * s_.ways * s_.support),
        products_(inner.options.dual ? s_.support * s_.support : s_.steps * s_.ways * s_.features),
        head_(s_.ways * (s_.features + 1)),
        upstream_(s_.ways * (s_.features + 1)),
        inputs_(inner.shape),
        queries_(outer.shape),
        outputs_(outer.shape.support * s_.ways) {}

  // Computes the gradients of `scale` times the loss.
  value_t run(const HeadSource<scalar_t>& support, const HeadSource<scalar_t>& query, value_t scale,
              bool first_order, scalar_t* outputs, const HeadGradients<value_t>& grad,
              const HeadGradients<value_t>& of_query) {
    const auto task = inputs_.read(support);
    const HeadKept<value_t> kept{predictions_.data(), products_.data()};
    value_t* bias = has_bias_ ? head_.data() + s_.ways * s_.features : nullptr;
    inner_.forward(task, kept, head_.data(), bias);
    auto examples = queries_.read(query);
    examples.weight = head_.data();
    examples.bias = bias;
    value_t* upstream_bias = upstream_.data() + s_.ways * s_.features;
    const value_t loss =
        outer_.loss(examples, scale, outputs_.target(outputs),
                    {of_query.x, upstream_.data(), upstream_bias, nullptr, of_query.targets});
    outputs_.write(outputs);
    inner_.backward(task, kept, upstream_.data(), upstream_bias, first_order, grad);
    return loss;
  }

 private:
  const LinearHeadShape s_;
  const bool has_bias_;
  CpuHead<value_t> inner_, outer_;
  Buffer<value_t> predictions_, products_, head_, upstream_;  // of weight, then bias
  HeadInputs<scalar_t> inputs_, queries_;
  WideArray<scalar_t> outputs_;
};

using Tensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                           at::Tensor, at::Tensor, at::Tensor>;

Tensors linear_head_loss_cpu(const at::Tensor& x, const at::Tensor& targets,
                             const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                             const at::Tensor& lr, const at::Tensor& query,
                             const at::Tensor& query_targets, std::string_view loss,
                             double weight_decay, bool dual, bool first_order, bool input_grad) {
  const auto inner = checked_head(x, targets, weight, bias, lr, loss, weight_decay, dual);
  // The queries' head is the support's with other values, and takes no step.
  const auto outer = checked_head(query, query_targets, weight, bias, lr.slice(1, 0, 0), loss, 0,
                                  false, "query_targets");
  const auto& s = inner.shape;
  auto found = at::empty({s.tasks}, wide_options(x));
  auto outputs = at::empty({s.tasks, outer.shape.support, s.ways}, x.options());
  const bool has_x = input_grad && !first_order;
  const auto grads = empty_head_gradients(x, s, inner.options, has_x);
  const bool has_targets = inner.options.loss == HeadLoss::kMse;
  const HeadGradientTensors of_query{
      at::empty({s.tasks, outer.shape.support, input_grad ? s.features : 0}, x.options()),
      at::empty({s.tasks, outer.shape.support, has_targets ? s.ways : 0}, x.options()),
      {},
      {},
      {}};
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, x.scalar_type(), "linear_head_loss", [&] {
        using value_t = acc_t<scalar_t>;
        const value_t scale = value_t(1) / static_cast<value_t>(s.tasks);
        parallel_for(0, s.tasks, 1, [&](int64_t begin, int64_t end) {
          const FlushDenormals flush;
          LossWorker<scalar_t> worker(inner, outer);
          HeadOutputs<scalar_t> wide(s, has_x), wide_query(outer.shape, input_grad);
          for (int64_t t = begin; t < end; ++t) {
            const auto to = head_gradients_of<scalar_t>(grads, t);
            const auto query_to = head_gradients_of<scalar_t>(of_query, t);
            auto* of_lr = std::get<4>(grads).template mutable_data_ptr<value_t>() + t * s.steps;
            found.mutable_data_ptr<value_t>()[t] =
                worker.run(inner.task<scalar_t>(t), outer.task<scalar_t>(t), scale, first_order,
                           outputs.mutable_data_ptr<scalar_t>() + t * outer.shape.support * s.ways,
                           wide.targets(to, of_lr), wide_query.targets(query_to, nullptr));
            wide.write(to);
            wide_query.write(query_to);
          }
        });
      });
  const auto& [grad_x, grad_targets, grad_weight, grad_bias, grad_lr] = grads;
  return {found,
          outputs,
          grad_x,
          grad_targets,
          grad_weight,
          grad_bias,
          grad_lr,
          std::get<0>(of_query),
          std::get<1>(of_query)};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastmeta, CPU, m) { m.impl("linear_head_loss", &linear_head_loss_cpu); }

}  // namespace fastmeta
