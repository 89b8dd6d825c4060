// What linear_head needs of a loss, on lanes of examples: arrays [N, width], width whole vectors.
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

  // Predictions p in place of the outputs z.
  void predict(value_t* z) const {
    if (loss_ == HeadLoss::kMse) return;
    for (int64_t i = 0; i < width_; i += Vec::size()) {
      loss_ == HeadLoss::kLogistic ? sigmoid(z + i) : softmax(z + i);
    }
  }

  // f (p - y), factors f [width].
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

  // J v, J the derivative of the residual to the outputs.
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
  void sigmoid(value_t* z) const {
    const Vec one(value_t(1));
    (one / (one + Vec::loadu(z).neg().exp())).store(z);
  }
  void softmax(value_t* z) const {
    Vec largest = Vec::loadu(z), sum(value_t(0));
    for (int64_t n = 1; n < ways_; ++n) {
      largest = at::vec::maximum(largest, Vec::loadu(z + n * width_));
    }
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
