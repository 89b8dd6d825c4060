#include "pairwise_distance/row_loss.cuh"
#include "prototype_loss/prototype_loss.h"

namespace fastmeta {
namespace {

// Softmax over prototypes, for row_loss.cuh.
template <typename scalar_t>
class SoftmaxLoss {
  using value_t = acc_t<scalar_t>;

 public:
  struct Row {
    int64_t label;
    value_t label_logit;
  };
  struct Column {};
  static constexpr bool kHasColumns = false;
  using State = Softmax<value_t>;

  SoftmaxLoss(const LossOperands&, const Chunk&) {}

  static __device__ Row row(int64_t label) { return {label, value_t(0)}; }
  static __device__ State empty() { return empty_softmax<value_t>(); }

  __device__ bool is_valid(int64_t label, int64_t classes) const {
    return label >= 0 && label < classes;
  }

  template <typename Columns, int n>
  __device__ State state(Row& row, const Columns& columns, const value_t (&logits)[n]) const {
    const int label = place_of(row, columns);
#pragma unroll
    for (int j = 0; j < n; ++j) {
      // At most one lane owns the label's column, so there is no race.
      if (columns.place(j) == label) row.label_logit = logits[j];
    }
    return softmax_of(logits);
  }

  __device__ value_t value(const Row& row, const State& softmax) const {
    return std::log(softmax.sum) + (softmax.largest - row.label_logit);
  }

  __device__ auto residuals(const Row& row, const State& softmax) const {
    // One division a row instead of one a class.
    const value_t inverse_sum = 1 / softmax.sum;
    return [=](const auto& columns, int j, value_t logit) {
      const value_t probability = std::exp(logit - softmax.largest) * inverse_sum;
      return probability - value_t(columns.place(j) == place_of(row, columns) ? 1 : 0);
    };
  }

 private:
  // Column of the label in a tile, or -1 if the label's prototype lies in another tile.
  template <typename Columns>
  static __device__ int place_of(const Row& row, const Columns& columns) {
    const int64_t place = row.label - columns.first;
    return place >= 0 && place < columns.count ? static_cast<int>(place) : -1;
  }
};

}  // namespace

int64_t prototype_loss_workspace(const LossOperands& operands) {
  return row_loss_workspace(operands.pairwise);
}

int launch_prototype_loss(LossOperands operands, void* loss, void* workspace, void* stream) {
  return launch_row_loss<SoftmaxLoss>(operands, loss, workspace, stream);
}

int64_t prototype_loss_backward_workspace(const LossOperands& operands) {
  return row_loss_backward_workspace<SoftmaxLoss>(operands.pairwise);
}

int launch_prototype_loss_backward(LossOperands operands, const void* weight, void* loss,
                                   void* grad_query, void* grad_prototypes, void* workspace,
                                   void* stream) {
  return launch_row_loss_backward<SoftmaxLoss>(operands, weight, loss, grad_query, grad_prototypes,
                                               workspace, stream);
}

}  // namespace fastmeta
