// CPU implementation of matching_loss: two softmaxes of a row of distances.
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string_view>
#include <tuple>

#include "common/cpu/softmax_row.h"
#include "common/labels.h"
#include "matching_loss/arguments.h"
#include "matching_loss/matching_loss.h"
#include "pairwise_distance/row_loss.h"
#include "pairwise_distance/row_loss_cpu.h"

namespace fastmeta {
namespace {

// Labels of a task, and options.
template <typename value_t>
struct Task {
  const int64_t *query_labels, *support_labels;
  int64_t supports;
  value_t scale;
  bool exclude_self;
};

// Loss of the queries of a task, for row_loss_cpu.h.
template <typename value_t>
class MatchingRows {
  using Vec = at::vec::Vectorized<value_t>;

 public:
  explicit MatchingRows(const Task<value_t>& task)
      : task_(task),
        seen_(task.supports + kPastRow),
        same_(task.supports + kPastRow),
        exponentials_(task.supports + kPastRow) {
    for (int64_t s = 0; s < task.supports; ++s) seen_[s] = task.support_labels[s] != kAbsent;
    std::fill_n(&seen_[task.supports], kPastRow, value_t(0));
    std::fill_n(&same_[task.supports], kPastRow, value_t(0));
  }

  value_t loss(int64_t q, const value_t* distances) {
    return task_.query_labels[q] == kAbsent ? value_t(0) : softmaxes(q, distances).loss;
  }

  template <typename MetricConstant>
  value_t weigh(MetricConstant metric, int64_t q, value_t weight, value_t* row) {
    if (task_.query_labels[q] == kAbsent) {
      std::fill_n(row, task_.supports, value_t(0));
      return 0;
    }
    const Softmaxes softmaxes = this->softmaxes(q, row);
    const value_t inverse_sum = 1 / softmaxes.sum;
    const value_t inverse_sum_at_class = softmaxes.is_far ? value_t(0) : inverse_sum;
    for (int64_t s = 0; s < task_.supports; ++s) {
      const bool is_same = same_[s] != 0;
      const value_t probability = exponentials_[s] * (is_same ? inverse_sum_at_class : inverse_sum);
      // A quotient, which is exactly 1 for the only support of the class.
      const value_t of_class = is_same ? exponentials_[s] / softmaxes.sum_of_class : value_t(0);
      const value_t upstream = loss_upstream(task_.scale, weight, probability - of_class);
      row[s] = gradient_weight(metric(), upstream, row[s]);
    }
    return softmaxes.loss;
  }

 private:
  struct Softmaxes {
    value_t loss;
    value_t sum, sum_of_class;  // of exponentials_: all, and the ones of the class
    bool is_far;                // exponentials_ of the class have a scale of their own
  };

  // Both softmaxes of query q. exponentials_ gets exp(a - largest a). If the class is so far that its
  // exponentials would lose digits to underflow, they are exp(a - largest a of the class) instead;
  // the probability of the class is then less than any rounding.
  Softmaxes softmaxes(int64_t q, const value_t* distances) {
    compare_labels(q);
    Vec largest_seen(kNever), largest_same(kNever);
    for_vectors([&](int64_t s) {
      const Vec logits = Vec(-task_.scale) * Vec::loadu(distances + s);
      const Vec seen = where(seen_, s, logits);
      seen.store(&exponentials_[s]);
      largest_seen = at::vec::maximum(largest_seen, seen);
      largest_same = at::vec::maximum(largest_same, where(same_, s, logits));
    });
    if (task_.exclude_self) seen_[q] = task_.support_labels[q] != kAbsent;
    const value_t largest = largest_lane(largest_seen), of_class = largest_lane(largest_same);
    Vec sums(value_t(0)), same_sums(value_t(0)), same_largest(value_t(0));
    for_vectors([&](int64_t s) {
      const Vec e = (Vec::loadu(&exponentials_[s]) - Vec(largest)).exp();
      const Vec same = e * Vec::loadu(&same_[s]);
      e.store(&exponentials_[s]);
      sums = sums + e;
      same_sums = same_sums + same;
      same_largest = at::vec::maximum(same_largest, same);
    });
    Softmaxes result{0, sum_of_lanes(sums), sum_of_lanes(same_sums), largest - of_class > kFar};
    value_t of_class_over_largest = result.sum_of_class / largest_lane(same_largest);
    if (result.is_far) {
      of_class_over_largest = result.sum_of_class = rescale_class(distances, of_class);
    }
    // The logarithm is exactly 0 for the only support of the class.
    result.loss = std::log(result.sum) + largest - (std::log(of_class_over_largest) + of_class);
    return result;
  }

  // Sets same_ to whether a support is of query q's class, and seen_ to what it sees.
  void compare_labels(int64_t q) {
    const int64_t label = task_.query_labels[q];
    for (int64_t s = 0; s < task_.supports; ++s) same_[s] = task_.support_labels[s] == label;
    if (task_.exclude_self) seen_[q] = same_[q] = 0;
  }

  // Sets exponentials_ of the class to exp(a - largest); returns their sum.
  value_t rescale_class(const value_t* distances, value_t largest) {
    value_t sum = 0;
    for (int64_t s = 0; s < task_.supports; ++s) {
      if (same_[s] == 0) continue;
      exponentials_[s] = std::exp(-task_.scale * distances[s] - largest);
      sum += exponentials_[s];
    }
    return sum;
  }

  template <typename Body>
  void for_vectors(const Body& body) const {
    for (int64_t s = 0; s < task_.supports; s += Vec::size()) body(s);
  }

  // Values where `flags` are 1, minus infinity where they are 0.
  static Vec where(const Buffer<value_t>& flags, int64_t s, const Vec& values) {
    return Vec::blendv(Vec(kNever), values, Vec::loadu(flags.data() + s) > Vec(value_t(0)));
  }

  static constexpr value_t kNever = -std::numeric_limits<value_t>::infinity();
  // exp(-kFar) times the smallest part that counts is still a normal number.
  static constexpr value_t kFar = sizeof(value_t) == 8 ? 670 : 70;

  const Task<value_t> task_;
  // 1 or 0 for each support: whether the query sees it, and whether it is of the query's class.
  Buffer<value_t> seen_, same_;
  Buffer<value_t> exponentials_;
};

struct Arguments {
  RowLossOperands operands;
  at::Tensor query_labels, support_labels;
  double scale;
  bool exclude_self;

  // For row_loss_cpu.h.
  auto rows_of() const {
    return [this](auto value, int64_t t) {
      using value_t = decltype(value);
      const auto& shape = operands.shape;
      return MatchingRows<value_t>({query_labels.const_data_ptr<int64_t>() + t * shape.queries,
                                    support_labels.const_data_ptr<int64_t>() + t * shape.classes,
                                    shape.classes, static_cast<value_t>(scale), exclude_self});
    };
  }
};

Arguments checked(const at::Tensor& query, const at::Tensor& query_labels,
                  const at::Tensor& support, const at::Tensor& support_labels,
                  std::string_view metric, double scale, bool exclude_self) {
  const PairwiseShape shape =
      checked_matching_shape(query, query_labels, support, support_labels, exclude_self);
  Arguments arguments{{checked_metric(metric), shape, query.contiguous(), support.contiguous()},
                      query_labels.contiguous(),
                      support_labels.contiguous(),
                      scale,
                      exclude_self};
  auto& [_, __, x, y] = arguments.operands;
  if (check_label_range(arguments.query_labels, kAnyLabel, "query_labels")) {
    x = without_absent(x, arguments.query_labels);
  }
  if (check_label_range(arguments.support_labels, kAnyLabel, "support_labels")) {
    y = without_absent(y, arguments.support_labels);
  }
  check_classes_of_queries(arguments.query_labels, arguments.support_labels, exclude_self);
  return arguments;
}

at::Tensor matching_loss_cpu(const at::Tensor& query, const at::Tensor& query_labels,
                             const at::Tensor& support, const at::Tensor& support_labels,
                             std::string_view metric, double scale, bool exclude_self) {
  const auto arguments =
      checked(query, query_labels, support, support_labels, metric, scale, exclude_self);
  return row_losses_cpu(arguments.operands, arguments.rows_of());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> matching_loss_backward_cpu(
    const at::Tensor& weight, const at::Tensor& query, const at::Tensor& query_labels,
    const at::Tensor& support, const at::Tensor& support_labels, std::string_view metric,
    double scale, bool exclude_self) {
  const auto arguments =
      checked(query, query_labels, support, support_labels, metric, scale, exclude_self);
  return row_losses_with_gradient_cpu(arguments.operands, weight, arguments.rows_of());
}

}  // namespace

TORCH_LIBRARY_IMPL(fastmeta, CPU, m) {
  m.impl("matching_loss", &matching_loss_cpu);
  m.impl("matching_loss_backward", &matching_loss_backward_cpu);
}

}  // namespace fastmeta
