// Ops of the task program: tensors to arguments, and the arguments to their device, `Device`:
//
//   run(args, theta)   runs the op; results that tasks share are zeros, to be added to
//   has_fused_bands(args)   whether it fuses bands of conv-norm-pool (parse.h)
//   check_labels(labels [T, B], lowest, classes, ignored, name)   ValueError for another label than
//       lowest .. classes - 1, and the ignored one
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zero.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cstring>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>

#include "common/check.h"
#include "task_program/op_arguments.h"
#include "task_program/parse.h"

namespace fastmeta {

// Arguments that keep their tensors alive.
class Call {
 public:
  Call(OpKind kind, const at::Tensor& code, const at::Tensor& theta, const at::Tensor& frozen)
      : parsed_(code), theta_(theta.contiguous()), frozen_(frozen.contiguous()) {
    const auto type = theta.scalar_type();
    TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble,
                     "theta: expected float32 or float64, got ", type);
    check_same(theta, frozen, "theta and frozen");
    args.kind = kind;
    args.dtype = type == at::kFloat ? Dtype::kFloat : Dtype::kDouble;
    args.program = parsed_.program();
    args.code = code.const_data_ptr<int64_t>();
    args.code_words = code.numel();
    TORCH_CHECK(theta.dim() == 1 || theta.dim() == 2, "theta: expected [P] or [T, P], got ",
                theta.sizes());
    TORCH_CHECK(theta.size(-1) == args.program.parameters, "theta: expected ",
                args.program.parameters, " parameters, got ", theta.sizes());
    check_shape(frozen, {args.program.frozen}, "frozen");
    TORCH_CHECK(kind == OpKind::kForward || args.program.loss.kind != LossKind::kNone,
                "the program has no loss");
    TORCH_CHECK(kind == OpKind::kForward || args.program.values[args.program.output].adapts,
                "no adapted parameter reaches the output");
    args.theta = theta_.const_data_ptr();
    args.theta_stride = theta.dim() == 1 ? 0 : args.program.parameters;
    args.frozen = frozen_.const_data_ptr();
  }

  // Raises ValueError for a label without a class.
  template <typename Device>
  ExampleSet examples(const at::Tensor& x, const at::Tensor& y, const std::string& name,
                      const std::optional<at::Tensor>& weight) {
    ExampleSet set = inputs(x, name);
    const at::Tensor targets = keep(dense_tasks(y));
    TORCH_CHECK(set.count > 0, name, "_x: expected at least one example, got ", x.sizes());
    if (args.program.loss.kind == LossKind::kCrossEntropy) {
      check_labels(y, x, (name + "_y").c_str());
      check_shape(y, {args.tasks, set.count}, (name + "_y").c_str());
      check_labels_of<Device>(args.program, targets, (name + "_y").c_str());
    } else {
      check_same(x, y, (name + "_x and " + name + "_y").c_str());
      TORCH_CHECK(y.dim() >= 2 && y.size(0) == args.tasks && y.size(1) == set.count &&
                      y.numel() == args.tasks * set.count * args.program.output_elements(),
                  name, "_y: expected ", args.program.output_elements(), " elements for each of ",
                  args.tasks, " x ", set.count, " examples, got ", y.sizes());
    }
    set.targets = targets.const_data_ptr();
    set.targets_stride = args.tasks > 0 ? targets.stride(0) : 0;
    if (weight) weigh(set, *weight, name + "_weight");
    return set;
  }

  // Raises ValueError for a label that the program does not take.
  template <typename Device>
  static void check_labels_of(const Program& program, const at::Tensor& labels, const char* name) {
    // Kernels of a batch norm cannot leave out an absent example.
    const int64_t lowest = program.has_batch_norm ? 0 : kAbsent;
    Device::check_labels(labels, lowest, program.output_elements(),
                         static_cast<int64_t>(program.loss.b), name);
  }

  ExampleSet inputs(const at::Tensor& x, const std::string& name) {
    check_same(theta_, x, ("theta and " + name + "_x").c_str());
    TORCH_CHECK(x.dim() >= 2, name, "_x: expected [T, B, ...], got ", x.sizes());
    set_tasks(x.size(0), name);
    const auto& dense = keep(dense_tasks(x));
    ExampleSet set;
    set.count = x.size(1);
    TORCH_CHECK(x.numel() == args.tasks * set.count * args.program.values[0].elements, name,
                "_x: expected ", args.program.values[0].elements, " elements an example, got ",
                x.sizes());
    set.x = dense.const_data_ptr();
    set.x_stride = args.tasks > 0 ? dense.stride(0) : 0;
    return set;
  }

  void step_sizes(const at::Tensor& lr, int64_t steps) {
    check_same(theta_, lr, "theta and lr");
    TORCH_CHECK(steps >= 0 && steps <= (1 << 30), "steps: expected at least 0, got ", steps);
    args.options.steps = static_cast<int>(steps);
    const int64_t p = args.program.adapted;
    TORCH_CHECK(
        lr.dim() == 3 && (lr.size(0) == 1 || lr.size(0) == steps) &&
            (lr.size(1) == 1 || lr.size(1) == args.tasks) && (lr.size(2) == 1 || lr.size(2) == p),
        "lr: expected [", steps, " or 1, ", args.tasks, " or 1, ", p, " or 1], got ", lr.sizes());
    const auto& dense = keep(lr.contiguous());
    args.lr = dense.const_data_ptr();
    args.lr_per_parameter = lr.size(2) == p && p > 1;
    args.lr_task_stride = lr.size(1) == 1 ? 0 : lr.size(2);
    args.lr_step_stride = lr.size(0) == 1 ? 0 : lr.size(1) * lr.size(2);
  }

  // Takes vectors [T, N, A].
  void vectors(const at::Tensor& x) {
    check_same(theta_, x, "vectors");
    TORCH_CHECK(x.dim() == 3 && x.size(0) == args.tasks && x.size(2) == args.program.adapted,
                "vectors: expected [", args.tasks, ", N, ", args.program.adapted, "], got ",
                x.sizes());
    args.vectors = x.size(1);
    args.given = keep(x.contiguous()).const_data_ptr();
  }

  // Address of x [T, A]; keeps a copy with contiguous rows.
  const void* given(const at::Tensor& x, const char* name) {
    check_same(theta_, x, name);
    check_shape(x, {args.tasks, args.program.adapted}, name);
    return keep(x.contiguous()).const_data_ptr();
  }

  void backward(bool first_order, bool keeps) {
    args.gradient = true;
    args.options.first_order = first_order;
    args.options.keeps_steps = keeps;
    args.keeps_states = !first_order;
  }

  at::Tensor result(at::IntArrayRef shape, void*& pointer) const {
    auto tensor = empty(shape);
    pointer = tensor.mutable_data_ptr();
    return tensor;
  }
  at::Tensor result_if(bool wanted, at::IntArrayRef shape, void*& pointer) const {
    return wanted ? result(shape, pointer) : unwanted();
  }
  at::Tensor unwanted() const { return empty({0}); }
  // Result that tasks may share: then zeros, to be added to.
  at::Tensor summed(bool shared, at::IntArrayRef shape, void*& pointer) const {
    if (!shared) return result(shape, pointer);
    auto tensor = empty(shape);
    pointer = tensor.mutable_data_ptr();
    if (theta_.is_cpu()) {
      std::memset(pointer, 0, tensor.nbytes());
    } else {
      tensor.zero_();
    }
    return tensor;
  }
  at::Tensor grad_theta() {
    args.grad_theta_shared = theta_.dim() == 1 && args.tasks != 1;
    return summed(args.grad_theta_shared, theta_.sizes(), args.grad_theta);
  }
  at::Tensor grad_lr(bool wanted, const at::Tensor& lr) {
    args.options.lr_grad = wanted && args.options.steps > 0;
    if (!wanted) return unwanted();
    if (args.options.steps == 0) return at::zeros(lr.sizes(), theta_.options());
    return summed(args.lr_task_stride == 0, lr.sizes(), args.grad_lr);
  }
  // Gradient of the support's inputs; first order does not reach them.
  at::Tensor grad_support(bool wanted, const at::Tensor& x) {
    if (wanted && (args.options.first_order || args.options.steps == 0)) {
      return at::zeros(x.sizes(), theta_.options());
    }
    return result_if(wanted, x.sizes(), args.grad_support);
  }

  // Sum of one number a task; on the CPU in double precision.
  at::Tensor sum(const at::Tensor& x) const {
    if (!x.is_cpu()) return x.sum();
    auto total = empty({});
    AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "sum", [&] {
      const auto* value = x.const_data_ptr<scalar_t>();
      *total.mutable_data_ptr<scalar_t>() =
          static_cast<scalar_t>(std::accumulate(value, value + x.numel(), 0.0));
    });
    return total;
  }

  template <typename Device>
  void run() {
    if (args.tasks == 0) return;
    if (Device::has_fused_bands(args) && args.grad_support == nullptr &&
        args.grad_query == nullptr) {
      parsed_.fuse_bands();
      args.program = parsed_.program();
    }
    Device::run(args, theta_);
  }

  OpArguments args;

 private:
  // Empty tensor like theta; on the CPU without the dispatcher, which takes as long as a small
  // call.
  at::Tensor empty(at::IntArrayRef shape) const {
    if (!theta_.is_cpu()) return at::empty(shape, theta_.options());
    return at::Tensor(at::detail::empty_cpu(shape, theta_.scalar_type()));
  }
  void weigh(ExampleSet& set, const at::Tensor& weight, const std::string& name) {
    TORCH_CHECK_VALUE(!args.program.has_batch_norm, name,
                      ": expected none for a program with a batch norm, got ", weight.sizes());
    check_same(theta_, weight, ("theta and " + name).c_str());
    check_shape(weight, {args.tasks, set.count}, name.c_str());
    const at::Tensor dense = keep(dense_tasks(weight));
    set.weight = dense.const_data_ptr();
    set.weight_stride = args.tasks > 0 ? dense.stride(0) : 0;
  }
  void set_tasks(int64_t tasks, const std::string& name) {
    TORCH_CHECK(kept_.empty() || tasks == args.tasks, name, "_x: expected ", args.tasks,
                " tasks, got ", tasks);
    TORCH_CHECK(theta_.dim() == 1 || theta_.size(0) == tasks, "theta: expected ", tasks,
                " tasks, got ", theta_.sizes());
    args.tasks = tasks;
  }
  const at::Tensor& keep(at::Tensor tensor) {
    kept_.push_back(std::move(tensor));
    return kept_.back();
  }
  // Returns x itself if each task's part is contiguous, also if tasks share it; else a copy.
  static at::Tensor dense_tasks(const at::Tensor& x) {
    if (x.is_contiguous() || x.numel() == 0) return x;
    return x.stride(0) == 0 && x.select(0, 0).is_contiguous() ? x : x.contiguous();
  }

  ParsedProgram parsed_;
  at::Tensor theta_, frozen_;
  std::vector<at::Tensor> kept_;
};

template <typename Device>
struct TaskProgramOps {
  using Tensor = at::Tensor;
  using Weight = std::optional<at::Tensor>;  // of examples [T, B]

  static void check_labels(const Tensor& code, const Tensor& support_y, const Tensor& query_y) {
    const ParsedProgram parsed(code);
    const Program& program = parsed.program();
    if (program.loss.kind != LossKind::kCrossEntropy) return;
    const auto check = [&](const Tensor& y, const char* name) {
      TORCH_CHECK(y.scalar_type() == at::kLong && y.dim() == 2, name,
                  ": expected int64 [T, B], got ", y.scalar_type(), " ", y.sizes());
      Call::check_labels_of<Device>(program, y.contiguous(), name);
    };
    check(support_y, "support_y");
    check(query_y, "query_y");
  }

  static Tensor forward(const Tensor& code, const Tensor& theta, const Tensor& frozen,
                        const Tensor& x) {
    Call call(OpKind::kForward, code, theta, frozen);
    call.args.query = call.inputs(x, "query");
    auto outputs =
        call.result({x.size(0), x.size(1), call.args.program.output_elements()}, call.args.outputs);
    if (x.size(1) > 0) call.run<Device>();
    return outputs;
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> gradient(const Tensor& code,
                                                             const Tensor& theta,
                                                             const Tensor& frozen, const Tensor& x,
                                                             const Tensor& y, bool input_grad,
                                                             const Weight& weight) {
    Call call(OpKind::kGradient, code, theta, frozen);
    OpArguments& args = call.args;
    args.query = call.examples<Device>(x, y, "query", weight);
    args.gradient = true;
    auto loss = call.result({args.tasks}, args.loss);
    auto outputs =
        call.result({args.tasks, x.size(1), args.program.output_elements()}, args.outputs);
    auto grad_theta = call.result({args.tasks, args.program.parameters}, args.grad_theta);
    auto grad_x = call.result_if(input_grad, x.sizes(), args.grad_query);
    call.run<Device>();
    return {loss, outputs, grad_theta, grad_x};
  }

  static std::tuple<Tensor, Tensor> hvp(const Tensor& code, const Tensor& theta,
                                        const Tensor& frozen, const Tensor& x, const Tensor& y,
                                        const Tensor& vector, bool input_grad,
                                        const Weight& weight) {
    Call call(OpKind::kHvp, code, theta, frozen);
    OpArguments& args = call.args;
    args.support = call.examples<Device>(x, y, "support", weight);
    args.gradient = true;
    args.given = call.given(vector, "vector");
    auto product = call.result({args.tasks, args.program.parameters}, args.grad_theta);
    auto grad_x = call.result_if(input_grad, x.sizes(), args.grad_support);
    call.run<Device>();
    return {product, grad_x};
  }

  static Tensor products(const Tensor& code, const Tensor& theta, const Tensor& frozen,
                         const Tensor& x, const Tensor& y, const Tensor& vectors, bool gauss_newton,
                         const Weight& weight) {
    Call call(OpKind::kHvp, code, theta, frozen);
    OpArguments& args = call.args;
    args.support = call.examples<Device>(x, y, "support", weight);
    args.gradient = true;
    args.gauss_newton = gauss_newton;
    call.vectors(vectors);
    auto products =
        call.result({args.tasks, args.vectors, args.program.parameters}, args.grad_theta);
    if (args.vectors > 0) call.run<Device>();
    return products;
  }

  static Tensor adapt(const Tensor& code, const Tensor& theta, const Tensor& frozen,
                      const Tensor& lr, const Tensor& x, const Tensor& y, int64_t steps,
                      int64_t shared, const Weight& weight) {
    Call call(OpKind::kAdapt, code, theta, frozen);
    OpArguments& args = call.args;
    TORCH_CHECK(shared == args.program.parameters - args.program.adapted, "shared: expected ",
                args.program.parameters - args.program.adapted, " as in the code, got ", shared);
    args.support = call.examples<Device>(x, y, "support", weight);
    call.step_sizes(lr, steps);
    auto adapted = call.result({args.tasks, args.program.adapted}, args.adapted);
    call.run<Device>();
    return adapted;
  }

  static std::tuple<Tensor, Tensor, Tensor> adapt_backward(
      const Tensor& code, const Tensor& theta, const Tensor& frozen, const Tensor& lr,
      const Tensor& x, const Tensor& y, int64_t steps, const Tensor& grad_out, bool first_order,
      bool keep, bool lr_grad, bool input_grad, const Weight& weight) {
    Call call(OpKind::kAdaptBackward, code, theta, frozen);
    OpArguments& args = call.args;
    args.support = call.examples<Device>(x, y, "support", weight);
    call.step_sizes(lr, steps);
    call.backward(first_order, keep);
    args.given = call.given(grad_out, "grad_out");
    auto grad_theta = call.grad_theta();
    auto grad_lr = call.grad_lr(lr_grad, lr);
    auto grad_x = call.grad_support(input_grad, x);
    call.run<Device>();
    return {grad_theta, grad_lr, grad_x};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> meta_gradient(
      const Tensor& code, const Tensor& theta, const Tensor& frozen, const Tensor& lr,
      const Tensor& support_x, const Tensor& support_y, const Tensor& query_x,
      const Tensor& query_y, at::ArrayRef<double> step_weights, int64_t steps, bool first_order,
      bool keep, bool gradient, bool lr_grad, bool support_grad, bool query_grad,
      const Weight& support_weight, const Weight& query_weight) {
    Call call(OpKind::kMeta, code, theta, frozen);
    OpArguments& args = call.args;
    args.support = call.examples<Device>(support_x, support_y, "support", support_weight);
    args.query = call.examples<Device>(query_x, query_y, "query", query_weight);
    call.step_sizes(lr, steps);
    TORCH_CHECK(step_weights.empty() || static_cast<int64_t>(step_weights.size()) == steps,
                "step_weights: expected ", steps, " numbers, got ", step_weights.size());
    args.step_weights = step_weights.vec();
    args.scale = args.tasks > 0 ? 1.0 / static_cast<double>(args.tasks) : 0;
    auto loss = call.result({args.tasks}, args.loss);
    auto outputs =
        call.result({args.tasks, query_x.size(1), args.program.output_elements()}, args.outputs);
    Tensor grad_theta, grad_lr, grad_support, grad_query;
    if (gradient) call.backward(first_order, keep);
    args.keeps_states = (gradient && !first_order) || !step_weights.empty();
    grad_theta = gradient ? call.grad_theta() : call.unwanted();
    grad_lr = call.grad_lr(gradient && lr_grad, lr);
    grad_support = call.grad_support(gradient && support_grad, support_x);
    grad_query = call.result_if(gradient && query_grad, query_x.sizes(), args.grad_query);
    call.run<Device>();
    return {call.sum(loss), outputs, grad_theta, grad_lr, grad_support, grad_query};
  }
};

template <typename Device>
void register_task_program(torch::Library& m) {
  using Ops = TaskProgramOps<Device>;
  m.impl("task_program_check_labels", &Ops::check_labels);
  m.impl("task_program_forward", &Ops::forward);
  m.impl("task_program_gradient", &Ops::gradient);
  m.impl("task_program_hvp", &Ops::hvp);
  m.impl("task_program_products", &Ops::products);
  m.impl("task_program_adapt", &Ops::adapt);
  m.impl("task_program_adapt_backward", &Ops::adapt_backward);
  m.impl("task_program_meta_gradient", &Ops::meta_gradient);
}

}  // namespace fastmeta
