// CPU implementation of prototype_loss: the softmax of a row of distances.
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string_view>
#include <tuple>

#include "common/cpu/softmax_row.h"
#include "common/labels.h"
#include "pairwise_distance/row_loss_cpu.h"
#include "prototype_loss/arguments.h"
#include "prototype_loss/prototype_loss.h"

namespace fastmeta {
namespace {

template <typename value_t>
struct Softmax {
  value_t loss, largest, sum;  // sum of exp(-scale d - largest)
};

// Computes one row of softmax(-scale distances): `exponentials` gets exp(-scale d - largest). Both
// arrays are read and written in whole vectors, past the end of the row.
template <typename value_t>
Softmax<value_t> softmax_row(const value_t* distances, value_t* exponentials, int64_t classes,
                             int64_t label, value_t scale) {
  using Vec = at::vec::Vectorized<value_t>;
  constexpr value_t kNever = -std::numeric_limits<value_t>::infinity();
  // Calls body(n, count) on each vector of the row, of which `count` numbers are of this row.
  const auto for_vectors = [&](const auto& body) {
    for (int64_t n = 0; n < classes; n += Vec::size()) {
      body(n, std::min<int64_t>(Vec::size(), classes - n));
    }
  };
  const auto only = [](value_t other, const Vec& values, int64_t count) {
    return count < Vec::size() ? Vec::set(Vec(other), values, count) : values;
  };
  Vec largest_of_lane(kNever);
  for_vectors([&](int64_t n, int64_t count) {
    const Vec logits = Vec(-scale) * Vec::loadu(distances + n);
    logits.store(exponentials + n);
    largest_of_lane = at::vec::maximum(largest_of_lane, only(kNever, logits, count));
  });
  const value_t largest = largest_lane(largest_of_lane), logit = exponentials[label];
  Vec sums(value_t(0));
  for_vectors([&](int64_t n, int64_t count) {
    const Vec e = (Vec::loadu(exponentials + n) - Vec(largest)).exp();
    e.store(exponentials + n);
    sums = sums + only(0, e, count);
  });
  const value_t sum = sum_of_lanes(sums);
  return {std::log(sum) + largest - logit, largest, sum};
}

// Loss of the queries of a task, for row_loss_cpu.h.
template <typename value_t>
class SoftmaxRows {
 public:
  SoftmaxRows(const int64_t* labels, int64_t classes, value_t scale)
      : labels_(labels), classes_(classes), scale_(scale), exponentials_(classes + kPastRow) {}

  value_t loss(int64_t q, const value_t* distances) {
    if (labels_[q] == kAbsent) return 0;
    return softmax_row(distances, exponentials_.data(), classes_, labels_[q], scale_).loss;
  }

  template <typename MetricConstant>
  value_t weigh(MetricConstant metric, int64_t q, value_t weight, value_t* row) {
    const int64_t label = labels_[q];
    if (label == kAbsent) {
      std::fill_n(row, classes_, value_t(0));
      return 0;
    }
    const auto softmax = softmax_row(row, exponentials_.data(), classes_, label, scale_);
    const value_t inverse_sum = 1 / softmax.sum;
    const auto weight_of = [&](int64_t n, bool is_label) {
      const value_t probability = exponentials_[n] * inverse_sum;
      const value_t upstream = distance_upstream(scale_, weight, probability, is_label);
      return gradient_weight(metric(), upstream, row[n]);
    };
    // Before the loop, which overwrites the distance at the label.
    const value_t at_label = weight_of(label, true);
    for (int64_t n = 0; n < classes_; ++n) row[n] = weight_of(n, false);
    row[label] = at_label;
    return softmax.loss;
  }

 private:
  const int64_t* labels_;
  int64_t classes_;
  value_t scale_;
  Buffer<value_t> exponentials_;
};

struct Arguments {
  RowLossOperands operands;
  at::Tensor labels;

  // For row_loss_cpu.h.
  auto rows_of(double scale) const {
    return [this, scale](auto value, int64_t t) {
      using value_t = decltype(value);
      const auto& shape = operands.shape;
      const int64_t* of_task = labels.const_data_ptr<int64_t>() + t * shape.queries;
      return SoftmaxRows<value_t>(of_task, shape.classes, static_cast<value_t>(scale));
    };
  }
};

Arguments checked(const at::Tensor& query, const at::Tensor& labels, const at::Tensor& prototypes,
                  std::string_view metric) {
  const PairwiseShape shape = checked_loss_shape(query, labels, prototypes);
  Arguments arguments{{checked_metric(metric), shape, query.contiguous(), prototypes.contiguous()},
                      labels.contiguous()};
  if (check_label_range(arguments.labels, shape.classes, "query_labels")) {
    arguments.operands.query = without_absent(arguments.operands.query, arguments.labels);
  }
  return arguments;
}

at::Tensor prototype_loss_cpu(const at::Tensor& query, const at::Tensor& labels,
                              const at::Tensor& prototypes, std::string_view metric, double scale) {
  const Arguments arguments = checked(query, labels, prototypes, metric);
  return row_losses_cpu(arguments.operands, arguments.rows_of(scale));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> prototype_loss_backward_cpu(
    const at::Tensor& weight, const at::Tensor& query, const at::Tensor& labels,
    const at::Tensor& prototypes, std::string_view metric, double scale) {
  const Arguments arguments = checked(query, labels, prototypes, metric);
  return row_losses_with_gradient_cpu(arguments.operands, weight, arguments.rows_of(scale));
}

}  // namespace

TORCH_LIBRARY_IMPL(fastmeta, CPU, m) {
  m.impl("prototype_loss", &prototype_loss_cpu);
  m.impl("prototype_loss_backward", &prototype_loss_backward_cpu);
}

}  // namespace fastmeta
