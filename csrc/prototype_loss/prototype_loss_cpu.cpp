// CPU implementation of prototype_loss: threads own blocks of queries, or tasks if there are many.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string_view>
#include <tuple>

#include "common/ceil_div.h"
#include "common/cpu/parallel.h"
#include "common/cpu/widen.h"
#include "common/labels.h"
#include "pairwise_distance/few_classes_cpu.h"
#include "pairwise_distance/tile_cpu.h"
#include "prototype_loss/arguments.h"
#include "prototype_loss/prototype_loss.h"

namespace fastmeta {
namespace {

template <typename value_t>
struct Softmax {
  value_t loss, largest, sum;  // sum of exp(-scale d - largest)
};

// Computes one row of softmax(-scale distances): `exponentials`, if wanted, gets exp(-scale d -
// largest). Both arrays are read and written in whole vectors, past the end of the row.
template <typename value_t>
Softmax<value_t> softmax_row(const value_t* distances, value_t* exponentials, int64_t classes,
                             int64_t label, value_t scale) {
  using Vec = at::vec::Vectorized<value_t>;
  constexpr value_t kNever = -std::numeric_limits<value_t>::infinity();
  // Calls body(n, values, count) on each vector of logits, of which `count` are of this row.
  const auto for_logits = [&](const auto& body) {
    for (int64_t n = 0; n < classes; n += Vec::size()) {
      const int64_t count = std::min<int64_t>(Vec::size(), classes - n);
      body(n, Vec(-scale) * Vec::loadu(distances + n), count);
    }
  };
  const auto only = [](value_t other, const Vec& values, int64_t count) {
    return count < Vec::size() ? Vec::set(Vec(other), values, count) : values;
  };
  Vec largest_of_lane(kNever);
  for_logits([&](int64_t, const Vec& logits, int64_t count) {
    largest_of_lane = at::vec::maximum(largest_of_lane, only(kNever, logits, count));
  });
  const value_t largest = at::vec::vec_reduce_all<value_t>(
      [](Vec a, Vec b) { return at::vec::maximum(a, b); }, largest_of_lane);
  const value_t logit = -scale * distances[label];
  Vec sums(value_t(0));
  for_logits([&](int64_t n, const Vec& logits, int64_t count) {
    const Vec e = (logits - Vec(largest)).exp();
    if (exponentials != nullptr) e.store(exponentials + n);
    sums = sums + only(0, e, count);
  });
  const value_t sum = at::vec::vec_reduce_all<value_t>([](Vec a, Vec b) { return a + b; }, sums);
  return {std::log(sum) + largest - logit, largest, sum};
}

template <typename scalar_t>
struct Task {
  Metric metric;
  PairwiseShape shape;
  acc_t<scalar_t> scale;
  const scalar_t* query;
  const int64_t* labels;
  const scalar_t* prototypes;
};

template <typename scalar_t>
void loss_task(const Task<scalar_t>& task, const ClassRows<acc_t<scalar_t>>& prototypes,
               acc_t<scalar_t>* loss) {
  using value_t = acc_t<scalar_t>;
  const auto& shape = task.shape;
  const int64_t block = prototypes.block_of_queries(), blocks = ceil_div(shape.queries, block);
  parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    // Per thread: the flag is a register of the core.
    const FlushDenormals flush;
    Buffer<value_t> rows(block * shape.features), distances(block * shape.classes + kPastRow);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * block, count = std::min(block, shape.queries - first);
      const value_t* query = prepare_rows(task.metric, task.query + first * shape.features, count,
                                          shape.features, rows.data());
      distance_rows(task.metric, query, count, prototypes, distances.data(), shape.classes);
      for (int64_t r = 0; r < count; ++r) {
        value_t* no_exponentials = nullptr;
        const int64_t label = task.labels[first + r];
        loss[first + r] = label == kAbsent
                              ? value_t(0)
                              : softmax_row(&distances[r * shape.classes], no_exponentials,
                                            shape.classes, label, task.scale)
                                    .loss;
      }
    }
  });
}

// Fills rows of W for PairwiseGradient, and the loss of these rows.
template <typename scalar_t>
auto weights_of(const Task<scalar_t>& task, const ClassRows<acc_t<scalar_t>>& prototypes,
                const acc_t<scalar_t>* weight, acc_t<scalar_t>* loss) {
  using value_t = acc_t<scalar_t>;
  return
      [=, &task, &prototypes](int64_t first, int64_t rows, const value_t* query, value_t* weights) {
        const int64_t classes = task.shape.classes;
        Buffer<value_t> exponentials(classes + kPastRow);
        distance_rows(task.metric, query, rows, prototypes, weights, classes);
        with_metric(task.metric, [&](auto metric) {
          for (int64_t r = 0; r < rows; ++r) {
            value_t* row = weights + r * classes;  // distances in, weights out
            const int64_t label = task.labels[first + r];
            if (label == kAbsent) {
              loss[first + r] = 0;
              std::fill_n(row, classes, value_t(0));
              continue;
            }
            const auto softmax = softmax_row(row, exponentials.data(), classes, label, task.scale);
            loss[first + r] = softmax.loss;
            const value_t w = weight[first + r], inverse_sum = 1 / softmax.sum;
            const auto weight_of = [&](int64_t n, bool is_label) {
              const value_t probability = exponentials[n] * inverse_sum;
              const value_t upstream = distance_upstream(task.scale, w, probability, is_label);
              return gradient_weight(metric(), upstream, row[n]);
            };
            // Before the loop, which overwrites the distance at the label.
            const value_t at_label = weight_of(label, true);
            for (int64_t n = 0; n < classes; ++n) row[n] = weight_of(n, false);
            row[label] = at_label;
          }
        });
      };
}

struct Arguments {
  Metric metric;
  PairwiseShape shape;
  at::Tensor query, labels, prototypes;

  template <typename scalar_t>
  Task<scalar_t> task(int64_t t, double scale) const {
    return {metric,
            shape,
            static_cast<acc_t<scalar_t>>(scale),
            query.const_data_ptr<scalar_t>() + t * shape.queries * shape.features,
            labels.const_data_ptr<int64_t>() + t * shape.queries,
            prototypes.const_data_ptr<scalar_t>() + t * shape.classes * shape.features};
  }
};

Arguments checked(const at::Tensor& query, const at::Tensor& labels, const at::Tensor& prototypes,
                  std::string_view metric) {
  const PairwiseShape shape = checked_loss_shape(query, labels, prototypes);
  Arguments arguments{checked_metric(metric), shape, query.contiguous(), labels.contiguous(),
                      prototypes.contiguous()};
  if (check_label_range(arguments.labels, shape.classes, "query_labels")) {
    arguments.query = without_absent(arguments.query, arguments.labels);
  }
  return arguments;
}

at::Tensor prototype_loss_cpu(const at::Tensor& query, const at::Tensor& labels,
                              const at::Tensor& prototypes, std::string_view metric, double scale) {
  const Arguments arguments = checked(query, labels, prototypes, metric);
  auto loss = at::empty(labels.sizes(), wide_options(query));
  if (loss.numel() == 0) return loss;
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, query.scalar_type(), "prototype_loss", [&] {
        auto* loss_data = loss.mutable_data_ptr<acc_t<scalar_t>>();
        const auto& shape = arguments.shape;
        for_each_task_range(shape.tasks, [&](int64_t begin, int64_t end) {
          ClassRows<acc_t<scalar_t>> prototypes(shape);
          for (int64_t t = begin; t < end; ++t) {
            const auto task = arguments.task<scalar_t>(t, scale);
            prototypes.prepare(task.metric, task.prototypes);
            loss_task(task, prototypes, loss_data + t * shape.queries);
          }
        });
      });
  return loss;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> prototype_loss_backward_cpu(
    const at::Tensor& weight, const at::Tensor& query, const at::Tensor& labels,
    const at::Tensor& prototypes, std::string_view metric, double scale) {
  const Arguments arguments = checked(query, labels, prototypes, metric);
  check_shape(weight, labels.sizes(), "weight");
  check_wide(weight, query, "weight");
  const auto weights = weight.contiguous();
  auto loss = at::empty(labels.sizes(), wide_options(query));
  auto grad_query = at::empty(query.sizes(), query.options());
  auto grad_prototypes = at::zeros(prototypes.sizes(), prototypes.options());
  if (loss.numel() == 0) return {loss, grad_query, grad_prototypes};
  const auto& shape = arguments.shape;
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, query.scalar_type(), "prototype_loss_backward", [&] {
        const auto* weight_data = weights.const_data_ptr<acc_t<scalar_t>>();
        auto* loss_data = loss.mutable_data_ptr<acc_t<scalar_t>>();
        auto* grad_query_data = grad_query.mutable_data_ptr<scalar_t>();
        auto* grad_prototypes_data = grad_prototypes.mutable_data_ptr<scalar_t>();
        for_each_task_range(shape.tasks, [&](int64_t begin, int64_t end) {
          ClassRows<acc_t<scalar_t>> classes(shape);
          with_gradient<scalar_t>(arguments.metric, shape, [&](auto&& gradient) {
            for (int64_t t = begin; t < end; ++t) {
              const auto task = arguments.task<scalar_t>(t, scale);
              const int64_t row = t * shape.queries;
              classes.prepare(task.metric, task.prototypes);
              gradient.run(task.query, task.prototypes,
                           weights_of(task, classes, weight_data + row, loss_data + row),
                           grad_query_data + row * shape.features,
                           grad_prototypes_data + t * shape.classes * shape.features);
            }
          });
        });
      });
  return {loss, grad_query, grad_prototypes};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastmeta, CPU, m) {
  m.impl("prototype_loss", &prototype_loss_cpu);
  m.impl("prototype_loss_backward", &prototype_loss_backward_cpu);
}

}  // namespace fastmeta
