#include "matching_loss/matching_loss.h"
#include "pairwise_distance/row_loss.cuh"

namespace fastmeta {
namespace {

// Softmaxes over the supports that a query sees, and over the ones of its class among them.
template <typename value_t>
struct MatchingState {
  Softmax<value_t> seen, same;
};

template <typename value_t>
__device__ MatchingState<value_t> merged(const MatchingState<value_t>& a,
                                         const MatchingState<value_t>& b) {
  return {merged(a.seen, b.seen), merged(a.same, b.same)};
}

template <typename value_t>
__device__ MatchingState<value_t> from_lane(const MatchingState<value_t>& state, int offset,
                                            int width) {
  return {from_lane(state.seen, offset, width), from_lane(state.same, offset, width)};
}

template <typename value_t>
__device__ void invalidate(MatchingState<value_t>& state) {
  invalidate(state.seen);
}

// Both softmaxes, for row_loss.cuh.
template <typename scalar_t>
class MatchingLoss {
  using value_t = acc_t<scalar_t>;

 public:
  struct Row {
    int64_t label;
  };
  using Column = int64_t;  // the support's label
  static constexpr bool kHasColumns = true;
  using State = MatchingState<value_t>;

  MatchingLoss(const MatchingOperands& operands, const Chunk& chunk)
      : supports_(operands.pairwise.shape.classes),
        support_labels_(operands.support_labels + chunk.first_task * supports_),
        first_row_(chunk.first_row),
        exclude_self_(operands.exclude_self) {}

  static __device__ Row row(int64_t label) { return {label}; }
  static __device__ State empty() { return {empty_softmax<value_t>(), empty_softmax<value_t>()}; }

  __device__ Column column(int64_t task, int64_t support) const {
    return support_labels_[task * supports_ + support];
  }

  __device__ bool is_valid(int64_t label, int64_t) const { return label >= 0; }

  template <typename Columns, int n>
  __device__ State state(const Row& row, const Columns& columns, value_t (&logits)[n]) const {
    constexpr value_t kNever = -std::numeric_limits<value_t>::infinity();
    State state;
#pragma unroll
    for (int j = 0; j < n; ++j) {
      if (!sees(columns, j)) logits[j] = kNever;
      // A kernel cannot raise: an invalid label of a support shows as NaN.
      if (is_invalid(columns, j)) logits[j] = std::numeric_limits<value_t>::quiet_NaN();
    }
    state.seen = softmax_of(logits);
#pragma unroll
    for (int j = 0; j < n; ++j) {
      if (!is_same(row, columns, j)) logits[j] = kNever;
    }
    state.same = softmax_of(logits);
    return state;
  }

  __device__ value_t value(const Row&, const State& state) const {
    const auto& [seen, same] = state;
    if (same.sum == 0) {
      return seen.sum == seen.sum ? std::numeric_limits<value_t>::infinity() : seen.sum;
    }
    return std::log(seen.sum) + (seen.largest - (std::log(same.sum) + same.largest));
  }

  __device__ auto residuals(const Row& row, const State& state) const {
    const auto& [seen, same] = state;
    const value_t largest = seen.largest, largest_same = same.largest;
    const value_t inverse_sum = 1 / seen.sum, inverse_sum_same = 1 / same.sum;
    return [=, this](const auto& columns, int j, value_t logit) {
      // NaN where the state is, for an invalid label; infinite for a query that sees none.
      const value_t probability =
          sees(columns, j) ? std::exp(logit - largest) * inverse_sum : value_t(0);
      const value_t of_class =
          is_same(row, columns, j) ? std::exp(logit - largest_same) * inverse_sum_same : value_t(0);
      return probability - of_class;
    };
  }

 private:
  template <typename Columns>
  __device__ bool sees(const Columns& columns, int j) const {
    const bool is_self = columns.first + columns.place(j) == first_row_ + columns.row;
    return columns.has(j) && columns.shared[columns.place(j)] != kAbsent &&
           !(exclude_self_ && is_self);
  }

  template <typename Columns>
  __device__ bool is_invalid(const Columns& columns, int j) const {
    return columns.has(j) && columns.shared[columns.place(j)] < kAbsent;
  }

  template <typename Columns>
  __device__ bool is_same(const Row& row, const Columns& columns, int j) const {
    return sees(columns, j) && columns.shared[columns.place(j)] == row.label;
  }

  int64_t supports_;
  const int64_t* support_labels_;
  int64_t first_row_;
  bool exclude_self_;
};

}  // namespace

int64_t matching_loss_workspace(const MatchingOperands& operands) {
  return row_loss_workspace(operands.pairwise);
}

int launch_matching_loss(MatchingOperands operands, void* loss, void* workspace, void* stream) {
  return launch_row_loss<MatchingLoss>(operands, loss, workspace, stream);
}

int64_t matching_loss_backward_workspace(const MatchingOperands& operands) {
  return row_loss_backward_workspace<MatchingLoss>(operands.pairwise);
}

int launch_matching_loss_backward(MatchingOperands operands, const void* weight, void* loss,
                                  void* grad_query, void* grad_support, void* workspace,
                                  void* stream) {
  return launch_row_loss_backward<MatchingLoss>(operands, weight, loss, grad_query, grad_support,
                                                workspace, stream);
}

}  // namespace fastmeta
