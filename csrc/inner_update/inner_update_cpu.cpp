// CPU kernels of inner_update. They are memory bound: one pass over blocks that stay in the L1
// cache.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <numeric>
#include <tuple>
#include <vector>

#include "common/cpu/parallel.h"
#include "common/cpu/widen.h"
#include "inner_update/arguments.h"

namespace fastmeta {
namespace {

constexpr int64_t kBlock = 1024;  // three float blocks: 12 KiB of L1
template <typename value_t>
using Block = std::array<value_t, kBlock>;

int64_t blocks_of(int64_t n) { return (n + kBlock - 1) / kBlock; }

// Calls body(task, first, count) for every block of every row, in parallel.
template <typename Body>
void for_each_block(const InnerUpdateShape& shape, const Body& body) {
  const int64_t per_row = blocks_of(shape.parameters);
  const int64_t grain = std::max<int64_t>(1, kGrain / kBlock);
  parallel_for(0, shape.tasks * per_row, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % per_row * kBlock;
      body(i / per_row, first, std::min(kBlock, shape.parameters - first));
    }
  });
}

// Loads a vector of step sizes: one number repeated (stride 0), or consecutive ones.
template <typename value_t>
struct StepSize {
  const value_t* lr;
  bool shared;
  auto load(int64_t i, int64_t count) const {
    using Vec = at::vec::Vectorized<value_t>;
    return shared ? Vec(*lr) : Vec::loadu(lr + i, count);
  }
};

template <typename value_t>
StepSize<value_t> step_size(const value_t* lr, const InnerUpdateShape& s, int64_t t, int64_t p) {
  return {lr + t * s.lr_task_stride + p * s.lr_parameter_stride, s.lr_parameter_stride == 0};
}

template <typename scalar_t>
void update_cpu(const scalar_t* params, const scalar_t* grads, const acc_t<scalar_t>* lr,
                scalar_t* out, const InnerUpdateShape& shape) {
  using value_t = acc_t<scalar_t>;
  using Vec = at::vec::Vectorized<value_t>;
  for_each_block(shape, [&](int64_t t, int64_t first, int64_t count) {
    Block<value_t> param_block, grad_block;
    auto* target = out + t * shape.parameters + first;
    const auto* p = widen(params + t * shape.params_stride + first, param_block.data(), count);
    const auto* g = widen(grads + t * shape.grads_stride + first, grad_block.data(), count);
    const auto lr_block = step_size(lr, shape, t, first);
    // Half types are updated in the widened copy, then narrowed.
    auto* o = widened_target(target, param_block.data());
    for (int64_t i = 0; i < count; i += Vec::size()) {
      const int64_t n = std::min<int64_t>(Vec::size(), count - i);
      descend(Vec::loadu(p + i, n), Vec::loadu(g + i, n), lr_block.load(i, n)).store(o + i, n);
    }
    if constexpr (is_reduced<scalar_t>) narrow(o, target, count);
  });
}

// Writes grad_grads of one block and adds -grads * grad_out to `products`, one entry a parameter.
template <typename scalar_t>
void backward_block(const acc_t<scalar_t>* g_out, const acc_t<scalar_t>* g,
                    StepSize<acc_t<scalar_t>> lr, acc_t<scalar_t>* grad_grads,
                    acc_t<scalar_t>* products, int64_t count) {
  using Vec = at::vec::Vectorized<acc_t<scalar_t>>;
  for (int64_t i = 0; i < count; i += Vec::size()) {
    const int64_t n = std::min<int64_t>(Vec::size(), count - i);
    const Vec upstream = Vec::loadu(g_out + i, n);
    (Vec::loadu(products + i, n) - Vec::loadu(g + i, n) * upstream).store(products + i, n);
    (lr.load(i, n) * upstream).neg().store(grad_grads + i, n);
  }
}

template <typename value_t>
value_t sum(const value_t* x, int64_t n) {
  using Vec = at::vec::Vectorized<value_t>;
  return at::vec::reduce_all<value_t>([](Vec a, Vec b) { return a + b; }, x, n);
}

// Sums over tasks for a block of parameters: one owner walks all tasks, so that the order is fixed.
// Parameters that share a step size give one number a (task, block) to `partial`; else grad_lr is
// written here.
template <typename scalar_t>
void backward_column(const scalar_t* grad_out, const scalar_t* grads, const acc_t<scalar_t>* lr,
                     scalar_t* grad_grads, acc_t<scalar_t>* grad_lr, double* partial,
                     const InnerUpdateShape& shape, int64_t block) {
  using value_t = acc_t<scalar_t>;
  const int64_t first = block * kBlock;
  const int64_t count = std::min(kBlock, shape.parameters - first);
  Block<value_t> out_block, grad_block, target_block, products{};
  for (int64_t t = 0; t < shape.tasks; ++t) {
    auto* target = grad_grads + t * shape.parameters + first;
    auto* wide = widened_target(target, target_block.data());
    backward_block<scalar_t>(
        widen(grad_out + t * shape.params_stride + first, out_block.data(), count),
        widen(grads + t * shape.grads_stride + first, grad_block.data(), count),
        step_size(lr, shape, t, first), wide, products.data(), count);
    if constexpr (is_reduced<scalar_t>) narrow(wide, target, count);
    // A sum ends with its task if tasks have step sizes of their own, else with the last task.
    const bool row_ends_here = shape.lr_task_stride != 0 || t + 1 == shape.tasks;
    if (!row_ends_here) continue;
    if (shape.lr_parameter_stride == 0) {
      const int64_t row = shape.lr_task_stride != 0 ? t : 0;
      partial[row * blocks_of(shape.parameters) + block] = sum(products.data(), count);
    } else {
      std::copy_n(products.data(), count, grad_lr + t * shape.lr_task_stride + first);
    }
    products.fill(0);
  }
}

template <typename scalar_t>
void update_backward_cpu(const scalar_t* grad_out, const scalar_t* grads, const acc_t<scalar_t>* lr,
                         scalar_t* grad_grads, acc_t<scalar_t>* grad_lr,
                         const InnerUpdateShape& shape) {
  const int64_t columns = blocks_of(shape.parameters);
  const int64_t rows = shape.lr_task_stride != 0 ? shape.tasks : 1;
  // Double: a sum over all parameters has many terms.
  std::vector<double> partial(shape.lr_parameter_stride == 0 ? rows * columns : 0);
  // A column is the work of all tasks.
  const int64_t grain = std::max<int64_t>(1, kGrain / (kBlock * shape.tasks));
  parallel_for(0, columns, grain, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      backward_column(grad_out, grads, lr, grad_grads, grad_lr, partial.data(), shape, block);
    }
  });
  if (shape.lr_parameter_stride == 0) {
    for (int64_t r = 0; r < rows; ++r) {
      const auto row = partial.begin() + r * columns;
      grad_lr[r] = static_cast<acc_t<scalar_t>>(std::accumulate(row, row + columns, 0.0));
    }
  }
}

at::Tensor inner_update_cpu(const at::Tensor& params, const at::Tensor& grads,
                            const at::Tensor& lr) {
  const auto p = with_contiguous_rows(params), g = with_contiguous_rows(grads);
  const auto step = lr.contiguous();
  const auto shape = checked_inner_update_shape(p, g, step);
  auto out = at::empty(params.sizes(), params.options());
  if (out.numel() == 0) return out;
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, params.scalar_type(), "inner_update", [&] {
        update_cpu(p.const_data_ptr<scalar_t>(), g.const_data_ptr<scalar_t>(),
                   step.const_data_ptr<acc_t<scalar_t>>(), out.mutable_data_ptr<scalar_t>(), shape);
      });
  return out;
}

std::tuple<at::Tensor, at::Tensor> inner_update_backward_cpu(const at::Tensor& grad_out,
                                                             const at::Tensor& grads,
                                                             const at::Tensor& lr) {
  const auto v = with_contiguous_rows(grad_out), g = with_contiguous_rows(grads);
  const auto step = lr.contiguous();
  const auto shape = checked_inner_update_shape(v, g, step);
  auto grad_grads = at::empty(grads.sizes(), grads.options());
  auto grad_lr = at::zeros(lr.sizes(), lr.options());
  if (grad_grads.numel() == 0) return {grad_grads, grad_lr};
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, grads.scalar_type(), "inner_update_backward", [&] {
        update_backward_cpu(v.const_data_ptr<scalar_t>(), g.const_data_ptr<scalar_t>(),
                            step.const_data_ptr<acc_t<scalar_t>>(),
                            grad_grads.mutable_data_ptr<scalar_t>(),
                            grad_lr.mutable_data_ptr<acc_t<scalar_t>>(), shape);
      });
  return {grad_grads, grad_lr};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastmeta, CPU, m) {
  m.impl("inner_update", &inner_update_cpu);
  m.impl("inner_update_backward", &inner_update_backward_cpu);
}

}  // namespace fastmeta
