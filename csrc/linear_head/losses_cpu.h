// Losses of linear_head, on lanes of examples: arrays [N, width], width whole vectors.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cstdint>

#include "linear_head/linear_head.h"

namespace fastmeta {

template <typename value_t>
class HeadLossLanes {
  using Vec = at::vec::Vectorized<value_t>;

 public:
  HeadLossLanes(HeadLoss loss, int64_t ways, int64_t width)
      : loss_(loss), ways_(ways), width_(width) {}

  // Replaces the outputs z by predictions p.
  void predict(value_t* z) const {
    if (loss_ == HeadLoss::kMse) return;
    for (int64_t i = 0; i < width_; i += Vec::size()) {
      loss_ == HeadLoss::kLogistic ? sigmoid(z + i) : softmax(z + i);
    }
  }

  // Computes the mean loss of outputs z: the sum over examples of factors f [width] times each
  // one's loss. The loss of squares takes half of f.
  value_t value(const value_t* z, const value_t* wanted, const value_t* factor) const {
    Vec sum(value_t(0));
    for (int64_t i = 0; i < width_; i += Vec::size()) {
      const Vec loss = loss_ == HeadLoss::kMse        ? squares(z + i, wanted + i)
                       : loss_ == HeadLoss::kLogistic ? softplus(z + i, wanted + i)
                                                      : log_loss(z + i, wanted + i);
      sum = at::vec::fmadd(Vec::loadu(factor + i), loss, sum);
    }
    return at::vec::vec_reduce_all<value_t>([](Vec x, Vec y) { return x + y; }, sum);
  }

  // Computes f (p - y), factors f [width].
  void residual(const value_t* p, const value_t* wanted, const value_t* factor,
                value_t* out) const {
    for (int64_t n = 0; n < ways_; ++n) {
      for (int64_t i = 0; i < width_; i += Vec::size()) {
        const int64_t at = n * width_ + i;
        const Vec difference = Vec::loadu(p + at) - Vec::loadu(wanted + at);
        (Vec::loadu(factor + i) * difference).store(out + at);
      }
    }
  }

  // Computes J v, J the derivative of the residual with respect to the outputs.
  void curvature(const value_t* p, const value_t* v, const value_t* factor, value_t* out) const {
    for (int64_t i = 0; i < width_; i += Vec::size()) {
      const Vec f = Vec::loadu(factor + i);
      Vec mean(value_t(0));
      for (int64_t n = 0; loss_ == HeadLoss::kCrossEntropy && n < ways_; ++n) {
        mean = at::vec::fmadd(Vec::loadu(p + n * width_ + i), Vec::loadu(v + n * width_ + i), mean);
      }
      for (int64_t n = 0; n < ways_; ++n) {
        const int64_t at = n * width_ + i;
        const Vec probability = Vec::loadu(p + at), direction = Vec::loadu(v + at);
        Vec along = direction;
        if (loss_ == HeadLoss::kCrossEntropy) along = probability * (direction - mean);
        if (loss_ == HeadLoss::kLogistic) {
          along = probability * (Vec(value_t(1)) - probability) * direction;
        }
        (f * along).store(out + at);
      }
    }
  }

 private:
  Vec squares(const value_t* z, const value_t* wanted) const {
    Vec sum(value_t(0));
    for (int64_t n = 0; n < ways_; ++n) {
      const Vec difference = Vec::loadu(z + n * width_) - Vec::loadu(wanted + n * width_);
      sum = at::vec::fmadd(difference, difference, sum);
    }
    return sum * Vec(value_t(0.5));
  }
  // Computes log(1 + exp z) - y z.
  Vec softplus(const value_t* z, const value_t* wanted) const {
    const Vec output = Vec::loadu(z), zero(value_t(0));
    const Vec tail = output.abs().neg().exp().log1p();
    return at::vec::maximum(output, zero) + tail - Vec::loadu(wanted) * output;
  }
  // Computes log(sum of exp z) - z of the label.
  Vec log_loss(const value_t* z, const value_t* wanted) const {
    const Vec largest = max(z);
    Vec sum(value_t(0)), at_label(value_t(0));
    for (int64_t n = 0; n < ways_; ++n) {
      const Vec above = Vec::loadu(z + n * width_) - largest;
      sum = sum + above.exp();
      at_label = at::vec::fmadd(Vec::loadu(wanted + n * width_), above, at_label);
    }
    return sum.log() - at_label;
  }

  Vec max(const value_t* z) const {
    Vec largest = Vec::loadu(z);
    for (int64_t n = 1; n < ways_; ++n) {
      largest = at::vec::maximum(largest, Vec::loadu(z + n * width_));
    }
    return largest;
  }
  void sigmoid(value_t* z) const {
    const Vec one(value_t(1));
    (one / (one + Vec::loadu(z).neg().exp())).store(z);
  }
  void softmax(value_t* z) const {
    const Vec largest = max(z);
    Vec sum(value_t(0));
    for (int64_t n = 0; n < ways_; ++n) {
      const Vec e = (Vec::loadu(z + n * width_) - largest).exp();
      e.store(z + n * width_);
      sum = sum + e;
    }
    const Vec inverse = Vec(value_t(1)) / sum;
    for (int64_t n = 0; n < ways_; ++n) {
      (Vec::loadu(z + n * width_) * inverse).store(z + n * width_);
    }
  }

  HeadLoss loss_;
  int64_t ways_, width_;
};

}  // namespace fastmeta
