// Losses of queries over their distances to the rows of y, and their gradient in the same pass.
//
// Threads own blocks of queries, or tasks if there are many. The [Q, N] distances exist a block of
// rows at a time. rows_of(value, t) makes, for a thread, the loss of task t's queries in the type of
// `value`, an object with
//
//   value_t loss(q, distances)             of query q, from its row of distances
//   value_t weigh(metric, q, weight, row)  the same, and turns the distances in `row` into the
//                                          row's W of pairwise_distance.h, of weight * loss
//
// Rows may be read kPastRow numbers past their end.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <tuple>

#include "common/ceil_div.h"
#include "common/check.h"
#include "common/cpu/denormals.h"
#include "common/cpu/parallel.h"
#include "common/cpu/widen.h"
#include "pairwise_distance/few_classes_cpu.h"
#include "pairwise_distance/tile_cpu.h"

namespace fastmeta {

// query [T, Q, D] and y [T, N, D], contiguous.
struct RowLossOperands {
  Metric metric;
  PairwiseShape shape;
  at::Tensor query, y;

  template <typename scalar_t>
  const scalar_t* query_of(int64_t t) const {
    return query.const_data_ptr<scalar_t>() + t * shape.queries * shape.features;
  }
  template <typename scalar_t>
  const scalar_t* y_of(int64_t t) const {
    return y.const_data_ptr<scalar_t>() + t * shape.classes * shape.features;
  }
};

template <typename scalar_t, typename MakeRows>
void loss_of_task(const RowLossOperands& operands, int64_t t, const ClassRows<acc_t<scalar_t>>& y,
                  const MakeRows& make_rows, acc_t<scalar_t>* loss) {
  using value_t = acc_t<scalar_t>;
  const auto& shape = operands.shape;
  const scalar_t* queries = operands.query_of<scalar_t>(t);
  const int64_t block = y.block_of_queries(), blocks = ceil_div(shape.queries, block);
  parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    // Per thread: the flag is a register of the core.
    const FlushDenormals flush;
    Buffer<value_t> rows(block * shape.features), distances(block * shape.classes + kPastRow);
    auto losses = make_rows();
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * block, count = std::min(block, shape.queries - first);
      const value_t* query = prepare_rows(operands.metric, queries + first * shape.features, count,
                                          shape.features, rows.data());
      distance_rows(operands.metric, query, count, y, distances.data(), shape.classes);
      for (int64_t r = 0; r < count; ++r) {
        loss[first + r] = losses.loss(first + r, &distances[r * shape.classes]);
      }
    }
  });
}

// Fills rows of W for with_gradient(), and the loss of these rows.
template <typename value_t, typename MakeRows>
auto weights_of_loss(Metric metric, const ClassRows<value_t>& y, const MakeRows& make_rows,
                     const value_t* weight, value_t* loss) {
  return [=, &y, &make_rows](int64_t first, int64_t rows, const value_t* query, value_t* weights) {
    auto losses = make_rows();
    distance_rows(metric, query, rows, y, weights, y.rows());
    with_metric(metric, [&](auto constant) {
      for (int64_t q = first; q < first + rows; ++q) {
        loss[q] = losses.weigh(constant, q, weight[q], weights + (q - first) * y.rows());
      }
    });
  };
}

// Loss [T, Q], in the accumulation type.
template <typename RowsOf>
at::Tensor row_losses_cpu(const RowLossOperands& operands, const RowsOf& rows_of) {
  const auto& shape = operands.shape;
  auto loss = at::zeros({shape.tasks, shape.queries}, wide_options(operands.query));
  // Without rows of y all queries are absent.
  if (loss.numel() == 0 || shape.classes == 0) return loss;
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, operands.query.scalar_type(), "row_loss", [&] {
        using value_t = acc_t<scalar_t>;
        auto* loss_data = loss.mutable_data_ptr<value_t>();
        for_each_task_range(shape.tasks, [&](int64_t begin, int64_t end) {
          ClassRows<value_t> y(shape);
          for (int64_t t = begin; t < end; ++t) {
            y.prepare(operands.metric, operands.y_of<scalar_t>(t));
            loss_of_task<scalar_t>(
                operands, t, y, [&] { return rows_of(value_t(0), t); },
                loss_data + t * shape.queries);
          }
        });
      });
  return loss;
}

// Loss [T, Q], and the gradient of sum(weight * loss) to query and y; weight [T, Q] of the
// accumulation type.
template <typename RowsOf>
std::tuple<at::Tensor, at::Tensor, at::Tensor> row_losses_with_gradient_cpu(
    const RowLossOperands& operands, const at::Tensor& weight, const RowsOf& rows_of) {
  const auto& shape = operands.shape;
  check_shape(weight, {shape.tasks, shape.queries}, "weight");
  check_wide(weight, operands.query, "weight");
  const auto weights = weight.contiguous();
  auto loss = at::zeros(weight.sizes(), wide_options(operands.query));
  auto grad_y = at::zeros(operands.y.sizes(), operands.y.options());
  if (loss.numel() == 0 || shape.classes == 0) {
    return {loss, at::zeros(operands.query.sizes(), operands.query.options()), grad_y};
  }
  auto grad_query = at::empty(operands.query.sizes(), operands.query.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, operands.query.scalar_type(), "row_loss", [&] {
        using value_t = acc_t<scalar_t>;
        const auto* weight_data = weights.const_data_ptr<value_t>();
        auto* loss_data = loss.mutable_data_ptr<value_t>();
        auto* grad_query_data = grad_query.mutable_data_ptr<scalar_t>();
        auto* grad_y_data = grad_y.mutable_data_ptr<scalar_t>();
        for_each_task_range(shape.tasks, [&](int64_t begin, int64_t end) {
          ClassRows<value_t> y(shape);
          with_gradient<scalar_t>(operands.metric, shape, [&](auto&& gradient) {
            for (int64_t t = begin; t < end; ++t) {
              const int64_t row = t * shape.queries;
              const auto make_rows = [&] { return rows_of(value_t(0), t); };
              y.prepare(operands.metric, operands.y_of<scalar_t>(t));
              gradient.run(operands.query_of<scalar_t>(t), operands.y_of<scalar_t>(t),
                           weights_of_loss(operands.metric, y, make_rows, weight_data + row,
                                           loss_data + row),
                           grad_query_data + row * shape.features,
                           grad_y_data + t * shape.classes * shape.features);
            }
          });
        });
      });
  return {loss, grad_query, grad_y};
}

}  // namespace fastmeta
