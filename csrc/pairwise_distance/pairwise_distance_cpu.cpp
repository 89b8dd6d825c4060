// CPU implementation of pairwise_distance: threads own rows of x.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <string_view>
#include <tuple>

#include "common/ceil_div.h"
#include "common/check.h"
#include "common/cpu/parallel.h"
#include "common/cpu/widen.h"
#include "pairwise_distance/arguments.h"
#include "pairwise_distance/few_classes_cpu.h"
#include "pairwise_distance/tile_cpu.h"

namespace fastmeta {
namespace {

template <typename scalar_t>
void distance_task(Metric metric, const scalar_t* x, const ClassRows<acc_t<scalar_t>>& y,
                   scalar_t* out, const PairwiseShape& shape) {
  using value_t = acc_t<scalar_t>;
  const int64_t block = y.block_of_queries(), blocks = ceil_div(shape.queries, block);
  parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    Buffer<value_t> rows(block * shape.features);
    Buffer<value_t> wide(is_reduced<scalar_t> ? block * shape.classes : 0);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * block, count = std::min(block, shape.queries - first);
      const value_t* prepared =
          prepare_rows(metric, x + first * shape.features, count, shape.features, rows.data());
      scalar_t* target = out + first * shape.classes;
      value_t* distances = widened_target(target, wide.data());
      distance_rows(metric, prepared, count, y, distances, shape.classes);
      if constexpr (is_reduced<scalar_t>) narrow(distances, target, count * shape.classes);
    }
  });
}

template <typename scalar_t>
auto weights_of(Metric metric, const scalar_t* upstream, const ClassRows<acc_t<scalar_t>>& y) {
  using value_t = acc_t<scalar_t>;
  return [=, &y](int64_t first, int64_t rows, const value_t* x, value_t* weights) {
    const int64_t classes = y.rows();
    Buffer<value_t> wide(classes);
    // The other metrics' weights do not depend on the distance.
    if (metric == Metric::kEuclidean) distance_rows(metric, x, rows, y, weights, classes);
    with_metric(metric, [&](auto constant) {
      for (int64_t r = 0; r < rows; ++r) {
        const value_t* g = widen(upstream + (first + r) * classes, wide.data(), classes);
        value_t* row = weights + r * classes;  // holds distances first if the metric needs them
        for (int64_t j = 0; j < classes; ++j) row[j] = gradient_weight(constant(), g[j], row[j]);
      }
    });
  };
}

at::Tensor pairwise_distance_cpu(const at::Tensor& x, const at::Tensor& y,
                                 std::string_view metric_name) {
  const Metric metric = checked_metric(metric_name);
  const PairwiseShape shape = checked_pairwise_shape(x, y);
  const auto rows = x.contiguous(), columns = y.contiguous();
  auto out = at::empty({shape.tasks, shape.queries, shape.classes}, x.options());
  if (out.numel() == 0) return out;
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, x.scalar_type(), "pairwise_distance", [&] {
        const auto* x_data = rows.const_data_ptr<scalar_t>();
        const auto* y_data = columns.const_data_ptr<scalar_t>();
        auto* out_data = out.mutable_data_ptr<scalar_t>();
        for_each_task_range(shape.tasks, [&](int64_t begin, int64_t end) {
          ClassRows<acc_t<scalar_t>> y(shape);
          for (int64_t t = begin; t < end; ++t) {
            y.prepare(metric, y_data + t * shape.classes * shape.features);
            distance_task(metric, x_data + t * shape.queries * shape.features, y,
                          out_data + t * shape.queries * shape.classes, shape);
          }
        });
      });
  return out;
}

std::tuple<at::Tensor, at::Tensor> pairwise_distance_backward_cpu(const at::Tensor& grad_distance,
                                                                  const at::Tensor& x,
                                                                  const at::Tensor& y,
                                                                  std::string_view metric_name) {
  const Metric metric = checked_metric(metric_name);
  const PairwiseShape shape = checked_pairwise_shape(x, y);
  check_shape(grad_distance, {shape.tasks, shape.queries, shape.classes}, "grad_distance");
  check_same(grad_distance, x, "grad_distance and x");
  const auto rows = x.contiguous(), columns = y.contiguous(), grad = grad_distance.contiguous();
  auto grad_x = at::zeros(x.sizes(), x.options()), grad_y = at::zeros(y.sizes(), y.options());
  if (grad.numel() == 0 || shape.features == 0) return {grad_x, grad_y};
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, x.scalar_type(), "pairwise_distance_backward", [&] {
        const auto* grad_data = grad.const_data_ptr<scalar_t>();
        const auto* x_data = rows.const_data_ptr<scalar_t>();
        const auto* y_data = columns.const_data_ptr<scalar_t>();
        auto* grad_x_data = grad_x.mutable_data_ptr<scalar_t>();
        auto* grad_y_data = grad_y.mutable_data_ptr<scalar_t>();
        for_each_task_range(shape.tasks, [&](int64_t begin, int64_t end) {
          ClassRows<acc_t<scalar_t>> classes(shape);
          with_gradient<scalar_t>(metric, shape, [&](auto&& gradient) {
            for (int64_t t = begin; t < end; ++t) {
              const int64_t x_row = t * shape.queries * shape.features;
              const int64_t y_row = t * shape.classes * shape.features;
              // Only weights_of() of this metric reads the classes.
              if (metric == Metric::kEuclidean) classes.prepare(metric, y_data + y_row);
              const auto* upstream = grad_data + t * shape.queries * shape.classes;
              gradient.run(x_data + x_row, y_data + y_row, weights_of(metric, upstream, classes),
                           grad_x_data + x_row, grad_y_data + y_row);
            }
          });
        });
      });
  return {grad_x, grad_y};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastmeta, CPU, m) {
  m.impl("pairwise_distance", &pairwise_distance_cpu);
  m.impl("pairwise_distance_backward", &pairwise_distance_backward_cpu);
}

}  // namespace fastmeta
