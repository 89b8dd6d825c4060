// Steps of a call in the form that a block runs: a list that the host records and a kernel gets as
// its argument. So the passes run on the host, once for all tasks, and the kernel has one loop for
// each kind of step. All kinds together are 526 KB of code (float, sm_90), more than an SM's
// instruction caches hold; a call has a few of the kinds.
#pragma once

#include <cstring>
#include <type_traits>

#include "task_program/cuda/block_waits.cuh"

namespace fastmeta {

// Product on offsets into the shared memory, -1: none. C = bias + sum, C += sum or C -= step size
// times sum.
struct BlockProduct {
  Form form;
  int m, n, k, c, bias;
  bool adds;
  int step_size;
  int pairs, a[2], b[2];
};

template <typename F, typename storage_t>
struct BlockSum {
  F f;
  Array<storage_t> target;
};

// Computes norm = scale/labels that count, or scale, from labels as numbers.
template <typename storage_t>
struct NormOfLabels {
  int64_t count;
  bool mean;
  double scale;
  Array<storage_t> targets, norm;

  template <typename ThreadGroup>
  FASTMETA_HOST_DEVICE void operator()(const ThreadGroup& group, int64_t) const {
    using number_t = typename ThreadGroup::number_t;
    number_t counted(0), absent(0);
    for (int64_t i = group.lane; i < count; i += group.size) {
      const number_t label = group.load(targets, i);
      counted = counted + number_t(label < 0 ? 0 : 1);
      absent = absent + number_t(label == kAbsent ? 1 : 0);
    }
    counted = group.sum(counted);
    absent = group.sum(absent);
    const double factor = norm_of_labels(scale, mean, counted, absent == count);
    if (group.lane == 0) group.store(norm, 0, static_cast<number_t>(factor));
  }
};

template <typename... Kinds>
struct StepKinds {
  static constexpr int kCount = sizeof...(Kinds);
  template <typename F>
  static constexpr int index() {
    int i = 0, found = -1;
    ((std::is_same_v<F, Kinds> ? found = i++ : i++), ...);
    return found;
  }
};

template <typename S>
using MapKinds =
    StepKinds<Fill<S>, Copy<S>, Sum<S>, ColumnSums<S>, ColumnSums<S, Descend<S>>, Descend<S>,
              SubtractProduct<S>, ActivationForward<Activation, S>, ActivationSlope<Activation, S>,
              ActivationTangentBackward<Activation, S>, LayerNormWeightGradient<S, false, NoFinish>,
              LayerNormWeightGradient<S, false, Descend<S>>,
              LayerNormWeightGradient<S, true, NoFinish>, RegressionTangent<SquaredError, S>,
              RegressionTangent<BceWithLogits, S>, RegressionTangent<Huber, S>,
              RegressionTangent<AbsoluteError, S>>;
template <typename S>
using RowKinds =
    StepKinds<NormOfLabels<S>, CrossEntropy<S>, CrossEntropyTangent<S>,
              RegressionLoss<SquaredError, S>, RegressionLoss<BceWithLogits, S>,
              RegressionLoss<Huber, S>, RegressionLoss<AbsoluteError, S>, WeightRows<S>,
              CopyParts<S>, LayerNormForward<S>, LayerNormTangentForward<S>, LayerNormBackward<S>,
              LayerNormTangentBackward<S>>;
template <typename S>
using SumKinds = StepKinds<BlockSum<WeightedElement<S>, S>, BlockSum<NegativeProduct<S>, S>>;

// Header of a step in the list.
struct alignas(8) StepHead {
  static constexpr int kProduct = -1;
  int n;
  int16_t bytes;  // of the step's numbers
  int8_t kind;    // map, row or sum, in this order
  Start start;
};

template <int bytes>
struct StepList {
  alignas(8) char data[bytes];
  int used = 0;
};

// Executor that records the steps it is given.
template <typename value_t, int bytes>
class BlockRecorder {
 public:
  using storage_t = InShared<value_t>;
  using Numbers = Array<storage_t>;
  static constexpr bool kCompilesEachActivation = false, kHasImages = false;
  static constexpr bool kHasFusedBands = false;

  explicit BlockRecorder(StepList<bytes>& list) : list_(list) {}

  bool fits() const { return fits_; }

  template <typename F>
  void map(int64_t n, const F& f) {
    // A step that tells what it touches may skip its barrier.
    if constexpr (requires { touched_by(f, n); }) {
      record_map(n, f, waits_.start(touched_by(f, n)));
    } else {
      record_map(n, f, waits_.start_after_all());
    }
  }

  template <typename F>
  void rows(int64_t n, const F& f) {
    constexpr int kKind = RowKinds<storage_t>::template index<F>();
    static_assert(kKind >= 0);
    record(MapKinds<storage_t>::kCount + kKind, n, f, waits_.start_after_all());
  }

  template <typename F>
  void reduce(int64_t n, const F& f, const Numbers& target) {
    using Step = BlockSum<F, storage_t>;
    constexpr int kKind = SumKinds<storage_t>::template index<Step>();
    static_assert(kKind >= 0);
    record(MapKinds<storage_t>::kCount + RowKinds<storage_t>::kCount + kKind, n, Step{f, target},
           waits_.start_after_all());
  }

  template <typename Finish>
  void product(const Product<storage_t>& p, const Finish& finish) {
    const auto number = [](int64_t x) { return static_cast<int>(x); };
    const BlockProduct step{p.form,
                            number(p.m),
                            number(p.n),
                            number(p.k),
                            p.c.offset,
                            p.bias.offset,
                            p.into.adds,
                            p.into.step_size.offset,
                            p.pairs,
                            {p.a[0].offset, p.a[1].offset},
                            {p.b[0].offset, p.b[1].offset}};
    record(StepHead::kProduct, p.m * p.n, step, waits_.start(touched_by(p)));
    if constexpr (!std::is_same_v<Finish, NoFinish>) {
      const int64_t n = p.m * p.n;
      record_map(n, finish, waits_.start_own(touched_by(finish, n), Range(p.c, n)));
    }
  }

 private:
  template <typename F>
  void record_map(int64_t n, const F& f, Start start) {
    constexpr int kKind = MapKinds<storage_t>::template index<F>();
    static_assert(kKind >= 0);
    record(kKind, n, f, start);
  }

  template <typename Step>
  void record(int kind, int64_t n, const Step& step, Start start) {
    static_assert(std::is_trivially_copyable_v<Step> && alignof(Step) <= 8);
    // Keeps the next header aligned.
    constexpr int kStepBytes = (sizeof(Step) + 7) / 8 * 8;
    fits_ = fits_ && list_.used + static_cast<int>(sizeof(StepHead)) + kStepBytes <= bytes;
    if (!fits_) return;
    const StepHead head{static_cast<int>(n), kStepBytes, static_cast<int8_t>(kind), start};
    std::memcpy(list_.data + list_.used, &head, sizeof(head));
    list_.used += sizeof(head);
    std::memcpy(list_.data + list_.used, &step, sizeof(step));
    list_.used += kStepBytes;
  }

  StepList<bytes>& list_;
  bool fits_ = true;
  BlockWaits waits_;
};

}  // namespace fastmeta
