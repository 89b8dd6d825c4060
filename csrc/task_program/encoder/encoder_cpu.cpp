// CPU implementation of the encoder's ops: threads take tasks, or share the images of each if tasks
// are fewer.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "common/ceil_div.h"
#include "common/check.h"
#include "common/cpu/denormals.h"
#include "common/cpu/parallel.h"
#include "common/cpu/workspace.h"
#include "task_program/encoder/encoder.h"
#include "task_program/encoder/worker_cpu.h"
#include "task_program/parse.h"

namespace fastmeta {
namespace {

using at::Tensor;

// Calls run(worker, task, whether it is the worker's first) for every task, then adds up the
// workers' gradients of theta in their order.
template <typename value_t, typename Run>
void run_tasks(const EncoderArguments& args, const Run& run) {
  using Worker = EncoderWorker<value_t>;
  using Vec = at::vec::Vectorized<value_t>;
  const bool shares_threads = args.tasks < thread_count();
  const int64_t workers = shares_threads ? 1 : thread_count();
  const int64_t bytes =
      ceil_div(Worker::elements(args, shares_threads) * int64_t(sizeof(value_t)), int64_t(64)) * 64;
  const auto memory = workspace(bytes * workers);
  auto* base = static_cast<char*>(memory.mutable_data_ptr());
  std::vector<const value_t*> sums(workers);
  parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    const FlushDenormals flush;
    for (int64_t w = begin; w < end; ++w) {
      Worker worker(args, reinterpret_cast<value_t*>(base + w * bytes), shares_threads);
      const int64_t first = w * args.tasks / workers, last = (w + 1) * args.tasks / workers;
      for (int64_t task = first; task < last; ++task) run(worker, task, task == first);
      sums[w] = worker.sum();
    }
  });
  if (args.grad_theta == nullptr) return;
  auto* total = static_cast<value_t*>(args.grad_theta);
  std::copy_n(sums[0], args.program.parameters, total);
  for (int64_t w = 1; w < workers; ++w) {
    at::vec::map2<value_t>([](Vec a, Vec b) { return a + b; }, total, total, sums[w],
                           args.program.parameters);
  }
}

// Arguments that keep their tensors alive.
class EncoderCall {
 public:
  EncoderCall(const Tensor& code, const Tensor& theta, const Tensor& frozen, const Tensor& x,
              bool input_grad)
      : parsed_(code),
        theta_(theta.contiguous()),
        frozen_(frozen.contiguous()),
        x_(x.contiguous()) {
    const auto type = theta.scalar_type();
    TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble,
                     "theta: expected float32 or float64, got ", type);
    check_same(theta, frozen, "theta and frozen");
    check_same(theta, x, "theta and x");
    if (!input_grad) parsed_.fuse_bands();
    const Program& program = args.program = parsed_.program();
    check_shape(theta, {program.parameters}, "theta");
    check_shape(frozen, {program.frozen}, "frozen");
    TORCH_CHECK(x.dim() >= 2 && x.size(0) > 0 && x.size(1) > 0 &&
                    x.numel() == x.size(0) * x.size(1) * program.values[0].elements,
                "x: expected [T, B, ...] of at least one example of ", program.values[0].elements,
                " elements, got ", x.sizes());
    args.tasks = x.size(0);
    args.examples = x.size(1);
    args.theta = theta_.const_data_ptr();
    args.frozen = frozen_.const_data_ptr();
    args.x = x_.const_data_ptr();
  }

  // Changes where the program's values lie.
  template <typename Change>
  void change(const Change& change) {
    change(parsed_);
    args.program = parsed_.program();
  }

  std::vector<int64_t> outputs_shape() const {
    return {args.tasks, args.examples, args.program.output_elements()};
  }

  Tensor result(at::IntArrayRef shape, void*& pointer) const {
    auto tensor = at::empty(shape, theta_.options());
    pointer = tensor.mutable_data_ptr();
    return tensor;
  }
  Tensor result_if(bool wanted, at::IntArrayRef shape, void*& pointer) const {
    return wanted ? result(shape, pointer) : at::empty({0}, theta_.options());
  }

  // Takes what `encode` kept, and the cotangent.
  void given(const Tensor& kept, const Tensor& grad) {
    check_same(theta_, kept, "theta and kept");
    check_same(theta_, grad, "theta and grad");
    check_shape(kept, {args.tasks, args.kept_elements()}, "kept");
    TORCH_CHECK(kept.is_contiguous(), "kept: expected it as encode returned it");
    check_shape(grad, outputs_shape(), "grad");
    kept_ = kept;
    grad_ = grad.contiguous();
    // The passes only read the values.
    args.kept = const_cast<void*>(kept_.const_data_ptr());
    args.grad_outputs = grad_.const_data_ptr();
  }

  // Address of a direction like `like`; keeps a contiguous copy.
  const void* direction(const std::optional<Tensor>& dot, const Tensor& like, const char* name) {
    if (!dot) return nullptr;
    check_same(theta_, *dot, name);
    check_shape(*dot, like.sizes(), name);
    directions_.push_back(dot->contiguous());
    return directions_.back().const_data_ptr();
  }

  template <typename Run>
  void run(const Run& run) const {
    if (theta_.scalar_type() == at::kFloat) {
      run_tasks<float>(args, run);
    } else {
      run_tasks<double>(args, run);
    }
  }

  EncoderArguments args;

 private:
  ParsedProgram parsed_;
  Tensor theta_, frozen_, x_, kept_, grad_;
  std::vector<Tensor> directions_;
};

std::tuple<Tensor, Tensor, Tensor> encode(const Tensor& code, const Tensor& theta,
                                          const Tensor& frozen, const Tensor& x, bool keeps,
                                          bool input_grad) {
  EncoderCall call(code, theta, frozen, x, input_grad);
  EncoderArguments& args = call.args;
  auto outputs = call.result(call.outputs_shape(), args.outputs);
  auto kept = call.result_if(keeps, {args.tasks, args.kept_elements()}, args.kept);
  auto statistics = call.result({args.tasks, args.statistics_elements()}, args.statistics);
  call.run([](auto& worker, int64_t task, bool) { worker.encode(task); });
  return {outputs, kept, statistics};
}

std::tuple<Tensor, Tensor> encode_backward(const Tensor& code, const Tensor& theta,
                                           const Tensor& frozen, const Tensor& x,
                                           const Tensor& kept, const Tensor& grad, bool theta_grad,
                                           bool input_grad) {
  EncoderCall call(code, theta, frozen, x, input_grad);
  EncoderArguments& args = call.args;
  call.given(kept, grad);
  call.change([](ParsedProgram& parsed) { parsed.share_deltas(); });
  auto grad_theta = call.result_if(theta_grad, theta.sizes(), args.grad_theta);
  auto grad_x = call.result_if(input_grad, x.sizes(), args.grad_x);
  call.run([](auto& worker, int64_t task, bool first) { worker.backward(task, !first); });
  return {grad_theta, grad_x};
}

std::tuple<Tensor, Tensor, Tensor> encode_backward_backward(const Tensor& code, const Tensor& theta,
                                                            const Tensor& frozen, const Tensor& x,
                                                            const Tensor& kept, const Tensor& grad,
                                                            const std::optional<Tensor>& theta_dot,
                                                            const std::optional<Tensor>& x_dot,
                                                            bool input_grad) {
  TORCH_CHECK(theta_dot || x_dot, "theta_dot and x_dot: expected one of them");
  TORCH_CHECK(input_grad || !x_dot, "x_dot: expected none without a gradient of x");
  EncoderCall call(code, theta, frozen, x, input_grad);
  if (x_dot) call.change([](ParsedProgram& parsed) { parsed.add_input_tangent(); });
  EncoderArguments& args = call.args;
  call.given(kept, grad);
  args.theta_dot = call.direction(theta_dot, theta, "theta_dot");
  args.x_dot = call.direction(x_dot, x, "x_dot");
  auto grad_grad = call.result(call.outputs_shape(), args.outputs_dot);
  auto grad_theta = call.result(theta.sizes(), args.grad_theta);
  auto grad_x = call.result_if(input_grad, x.sizes(), args.grad_x);
  call.run([](auto& worker, int64_t task, bool first) { worker.backward_backward(task, !first); });
  return {grad_grad, grad_theta, grad_x};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastmeta, CPU, m) {
  m.impl("encode", &encode);
  m.impl("encode_backward", &encode_backward);
  m.impl("encode_backward_backward", &encode_backward_backward);
}

}  // namespace fastmeta
