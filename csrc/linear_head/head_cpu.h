// Passes of linear_head over one task on a CPU; names as in linear_head.h. Arrays [N, S] lie in
// rows of whole vectors with zeros behind the S examples: the softmax then needs no sum over lanes.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/absent.h"
#include "common/ceil_div.h"
#include "common/cpu/register_gemm.h"
#include "common/cpu/row_sums.h"
#include "common/cpu/widen.h"
#include "linear_head/linear_head.h"
#include "linear_head/losses_cpu.h"

namespace fastmeta {

template <typename value_t>
struct HeadTask {
  const value_t *x, *weight, *bias, *lr, *targets;  // bias null without one
  const int64_t* labels;  // null with targets, and targets null with labels
};

// Arrays kept from the forward to the backward pass.
template <typename value_t>
struct HeadKept {
  value_t *predictions, *products;
};

template <typename value_t>
struct HeadGradients {
  value_t *x, *weight, *bias, *lr, *targets;  // null if absent
};

template <typename value_t>
class CpuHead {
  using Vec = at::vec::Vectorized<value_t>;

 public:
  CpuHead(const LinearHeadShape& shape, const LinearHeadOptions& options)
      : s_(shape),
        o_(options),
        width_(ceil_div(shape.support, int64_t(Vec::size())) * Vec::size()),
        lanes_(shape.ways * width_),
        head_(shape.ways * shape.features),
        loss_(options.loss, shape.ways, width_),
        factor_(zeros(width_)),
        wanted_(zeros(lanes_)),
        start_(zeros(lanes_)),
        outputs_(zeros(lanes_)),
        product_(zeros(lanes_)),
        gram_(zeros(options.dual ? shape.support * width_ : 0)),
        coefficients_(zeros((shape.steps + 1) * lanes_)),
        residuals_(zeros(shape.steps * lanes_)),
        shares_(zeros(shape.steps + 1)) {}

  void forward(const HeadTask<value_t>& task, const HeadKept<value_t>& kept, value_t* weight,
               value_t* bias) {
    set_wanted(task);
    outputs_of(task.x, task.weight, task.bias, start_.data());
    if (o_.dual) form_gram(task.x, kept.products);
    shares_[0] = 1;
    for (int64_t k = 0; k < s_.steps; ++k) {
      scale(shares_[k], start_.data(), outputs_.data(), lanes_);
      if (k > 0) add_product(task.x, coefficients(k), path(kept, k), outputs_.data());
      loss_.predict(outputs_.data());
      copy_lanes(outputs_.data(), width_, kept.predictions + k * s_.ways * s_.support, s_.support);
      step(task.lr, k, outputs_.data());
      if (!o_.dual) extend_path(task, kept, k);
    }
    finish(task, kept, weight, bias);
  }

  // Backward pass; upstream of the weight [N, D] and the bias [N] after all steps.
  void backward(const HeadTask<value_t>& task, const HeadKept<value_t>& kept,
                const value_t* upstream_weight, const value_t* upstream_bias, bool first_order,
                const HeadGradients<value_t>& grad) {
    Buffer<value_t> adjoints = zeros(s_.steps * lanes_), adjoint = zeros(lanes_);
    Buffer<value_t> sum = zeros(lanes_), of_targets = zeros(lanes_);
    Buffer<value_t> paths(o_.dual || first_order ? 0 : s_.steps * head_);  // Q_k
    const value_t weight_decay = value_t(o_.weight_decay);
    set_wanted(task);
    retrace(task.lr, kept);
    if (o_.dual) copy_lanes(kept.products, s_.support, gram_.data(), width_, s_.support);
    if (weight_decay != 0) outputs_of(task.x, task.weight, task.bias, start_.data());
    outputs_of(task.x, upstream_weight, upstream_bias, adjoint.data());
    value_t start_adjoint = dot(upstream_weight, task.weight, head_);
    if (o_.has_bias) start_adjoint += dot(upstream_bias, task.bias, s_.ways);

    for (int64_t k = s_.steps - 1; k >= 0; --k) {
      const value_t kept_share = decay(task.lr[k]);
      value_t* y = adjoints.data() + k * lanes_;
      grad.lr[k] = -dot(adjoint.data(), residuals_.data() + k * lanes_, lanes_);
      if (weight_decay != 0) {
        const value_t along = dot(adjoint.data(), coefficients(k), lanes_);
        grad.lr[k] -= weight_decay * (along + shares_[k] * start_adjoint);
        start_adjoint *= kept_share;
      }
      if (!first_order) {
        load_predictions(kept, k, outputs_.data());
        scale(-task.lr[k], adjoint.data(), product_.data(), lanes_);
        loss_.curvature(outputs_.data(), product_.data(), factor_.data(), y);
        add_scaled(shares_[k], y, sum.data(), lanes_);
        add_scaled(value_t(-1), y, of_targets.data(), lanes_);
        if (weight_decay != 0) start_adjoint += dot(y, start_.data(), lanes_);
      }
      scale(kept_share, adjoint.data(), adjoint.data(), lanes_);
      if (!first_order && k > 0) {
        value_t* q = paths.data() + (o_.dual ? 0 : k * head_);
        if (!o_.dual) times_examples(y, task.x, q, false);
        add_product(task.x, y, q, adjoint.data());
      }
    }

    scale(shares_[s_.steps], upstream_weight, grad.weight, head_);
    times_examples(sum.data(), task.x, grad.weight, true);
    for (int64_t n = 0; o_.has_bias && n < s_.ways; ++n) {
      grad.bias[n] = shares_[s_.steps] * upstream_bias[n] + row_sum(sum.data(), n);
    }
    if (grad.targets != nullptr) write_examples(of_targets.data(), grad.targets);
    if (grad.x == nullptr) return;
    examples_times(sum.data(), s_.ways, task.weight, grad.x, false);
    examples_times(coefficients(s_.steps), s_.ways, upstream_weight, grad.x, true);
    if (s_.steps < 2) return;
    const int64_t rows = (s_.steps - 1) * s_.ways;  // of steps 1 to K - 1: C_0 is 0
    if (o_.dual) {
      add_pairs(adjoints.data() + lanes_, rows, task.x, grad.x);
    } else {
      examples_times(adjoints.data() + lanes_, rows, path(kept, 1), grad.x, true);
      examples_times(coefficients(1), rows, paths.data() + head_, grad.x, true);
    }
  }

  // Computes the mean loss of the task's head on its examples, and `scale_by` times its gradients.
  value_t loss(const HeadTask<value_t>& task, value_t scale_by, value_t* outputs,
               const HeadGradients<value_t>& grad) {
    set_wanted(task);
    outputs_of(task.x, task.weight, task.bias, start_.data());
    write_examples(start_.data(), outputs);
    const value_t found = loss_.value(start_.data(), wanted_.data(), factor_.data());
    loss_.predict(start_.data());
    loss_.residual(start_.data(), wanted_.data(), factor_.data(), product_.data());
    scale(scale_by, product_.data(), product_.data(), lanes_);
    times_examples(product_.data(), task.x, grad.weight, false);
    for (int64_t n = 0; o_.has_bias && n < s_.ways; ++n) grad.bias[n] = row_sum(product_.data(), n);
    if (grad.x != nullptr) examples_times(product_.data(), s_.ways, task.weight, grad.x, false);
    if (grad.targets != nullptr) {
      scale(-1, product_.data(), product_.data(), lanes_);
      write_examples(product_.data(), grad.targets);
    }
    return found;
  }

 private:
  static Buffer<value_t> zeros(int64_t count) {
    Buffer<value_t> buffer(count);
    std::fill_n(buffer.data(), count, value_t(0));
    return buffer;
  }
  static void scale(value_t factor, const value_t* x, value_t* out, int64_t count) {
    at::vec::map<value_t>([factor](Vec a) { return Vec(factor) * a; }, out, x, count);
  }
  static void add_scaled(value_t factor, const value_t* x, value_t* out, int64_t count) {
    at::vec::map2<value_t>([factor](Vec a, Vec b) { return at::vec::fmadd(Vec(factor), a, b); },
                           out, x, out, count);
  }
  static value_t dot(const value_t* a, const value_t* b, int64_t count) {
    if (count == 0) return 0;
    return at::vec::map2_reduce_all<value_t>([](Vec x, Vec y) { return x * y; },
                                             [](Vec x, Vec y) { return x + y; }, a, b, count);
  }

  value_t decay(value_t lr) const { return 1 - lr * value_t(o_.weight_decay); }
  value_t* coefficients(int64_t k) { return coefficients_.data() + k * lanes_; }
  // Address of P_k, which the primal keeps for k = 1 .. K.
  value_t* path(const HeadKept<value_t>& kept, int64_t k) const {
    return kept.products + (k - 1) * head_;
  }
  value_t row_sum(const value_t* lanes, int64_t n) const {
    return at::vec::reduce_all<value_t>([](Vec x, Vec y) { return x + y; }, lanes + n * width_,
                                        s_.support);
  }

  void copy_lanes(const value_t* from, int64_t from_stride, value_t* to, int64_t to_stride,
                  int64_t rows) const {
    for (int64_t i = 0; i < rows; ++i) {
      std::copy_n(from + i * from_stride, s_.support, to + i * to_stride);
    }
  }
  void copy_lanes(const value_t* from, int64_t from_stride, value_t* to, int64_t to_stride) const {
    copy_lanes(from, from_stride, to, to_stride, s_.ways);
  }
  void load_predictions(const HeadKept<value_t>& kept, int64_t k, value_t* out) const {
    copy_lanes(kept.predictions + k * s_.ways * s_.support, s_.support, out, width_);
  }

  // Fills wanted_, y [N, S], one column a task example, and their factors f, 0 for absent ones.
  void set_wanted(const HeadTask<value_t>& task) {
    const int64_t absent =
        task.labels == nullptr ? 0 : std::count(task.labels, task.labels + s_.support, kAbsent);
    std::fill_n(factor_.data(), s_.support,
                value_t(residual_factor(o_.loss, s_, s_.support - absent)));
    if (task.labels == nullptr) {
      for (int64_t i = 0; i < s_.support * s_.ways; ++i) {
        wanted_[i % s_.ways * width_ + i / s_.ways] = task.targets[i];
      }
      return;
    }
    std::fill_n(wanted_.data(), lanes_, value_t(0));
    for (int64_t i = 0; i < s_.support; ++i) {
      if (task.labels[i] == kAbsent) {
        factor_[i] = 0;
        continue;
      }
      const int64_t row = o_.loss == HeadLoss::kLogistic ? 0 : task.labels[i];
      wanted_[row * width_ + i] = o_.loss == HeadLoss::kLogistic ? value_t(task.labels[i]) : 1;
    }
  }
  // Transposes [N, S] to [S, N].
  void write_examples(const value_t* lanes, value_t* out) const {
    for (int64_t i = 0; i < s_.support * s_.ways; ++i) {
      out[i] = lanes[i % s_.ways * width_ + i / s_.ways];
    }
  }

  // Computes (X weight' + bias)' of a head that may have no bias.
  void outputs_of(const value_t* x, const value_t* weight, const value_t* bias,
                  value_t* out) const {
    row_dots(s_.ways, s_.support, s_.features, weight, x, out, width_);
    for (int64_t n = 0; o_.has_bias && n < s_.ways; ++n) add_to_row(bias[n], n, out);
  }
  void add_to_row(value_t value, int64_t n, value_t* out) const {
    at::vec::map<value_t>([value](Vec a) { return a + Vec(value); }, out + n * width_,
                          out + n * width_, s_.support);
  }
  // Computes out [N, D] (+)= lanes X.
  void times_examples(const value_t* lanes, const value_t* x, value_t* out, bool adds) const {
    multiply<value_t>(s_.ways, s_.features, s_.support, {lanes, width_}, x, out, adds);
  }
  // Computes out [S, D] (+)= lanes' b, for lanes [rows, S] and b [rows, D].
  void examples_times(const value_t* lanes, int64_t rows, const value_t* b, value_t* out,
                      bool adds) const {
    multiply<value_t>(s_.support, s_.features, rows, {lanes, width_, true}, b, out, adds);
  }

  void form_gram(const value_t* x, value_t* products) {
    row_dots(s_.support, s_.support, s_.features, x, x, gram_.data(), width_);
    for (int64_t i = 0; o_.has_bias && i < s_.support; ++i) add_to_row(1, i, gram_.data());
    copy_lanes(gram_.data(), width_, products, s_.support, s_.support);
  }
  // Computes out += (X X' + 1) c, as lanes; path is c' X in the primal.
  void add_product(const value_t* x, const value_t* c, const value_t* path, value_t* out) {
    if (o_.dual) {
      multiply<value_t>(s_.ways, width_, s_.support, {c, width_}, gram_.data(), out, true);
      return;
    }
    row_dots(s_.ways, s_.support, s_.features, path, x, product_.data(), width_);
    add_scaled(1, product_.data(), out, lanes_);
    for (int64_t n = 0; o_.has_bias && n < s_.ways; ++n) add_to_row(row_sum(c, n), n, out);
  }

  // Computes G_k, C_{k+1} and c_{k+1} from the predictions of step k.
  void step(const value_t* lr, int64_t k, const value_t* predictions) {
    value_t *g = residuals_.data() + k * lanes_, *next = coefficients(k + 1);
    loss_.residual(predictions, wanted_.data(), factor_.data(), g);
    scale(decay(lr[k]), coefficients(k), next, lanes_);
    add_scaled(-lr[k], g, next, lanes_);
    shares_[k + 1] = decay(lr[k]) * shares_[k];
  }
  void retrace(const value_t* lr, const HeadKept<value_t>& kept) {
    shares_[0] = 1;
    for (int64_t k = 0; k < s_.steps; ++k) {
      load_predictions(kept, k, outputs_.data());
      step(lr, k, outputs_.data());
    }
  }
  // Computes P_{k+1} = (1 - lr w) P_k - lr G_k' X.
  void extend_path(const HeadTask<value_t>& task, const HeadKept<value_t>& kept, int64_t k) {
    scale(-task.lr[k], residuals_.data() + k * lanes_, product_.data(), lanes_);
    if (k > 0) scale(decay(task.lr[k]), path(kept, k), path(kept, k + 1), head_);
    times_examples(product_.data(), task.x, path(kept, k + 1), k > 0);
  }
  // Computes the head after all steps.
  void finish(const HeadTask<value_t>& task, const HeadKept<value_t>& kept, value_t* weight,
              value_t* bias) {
    const value_t share = shares_[s_.steps], *c = coefficients(s_.steps);
    scale(share, task.weight, weight, head_);
    if (o_.dual) {
      times_examples(c, task.x, weight, true);
    } else if (s_.steps > 0) {
      add_scaled(1, path(kept, s_.steps), weight, head_);
    }
    for (int64_t n = 0; o_.has_bias && n < s_.ways; ++n) {
      bias[n] = share * task.bias[n] + row_sum(c, n);
    }
  }
  // Computes out += sum_k (Y_k C_k' + C_k Y_k') X over rows of adjoints Y and coefficients from
  // step 1 on.
  void add_pairs(const value_t* adjoints, int64_t rows, const value_t* x, value_t* out) {
    Buffer<value_t> half(s_.support * width_), pairs(s_.support * width_);
    multiply<value_t>(s_.support, width_, rows, {adjoints, width_, true}, coefficients(1),
                      half.data(), false);
    for (int64_t i = 0; i < s_.support; ++i) {
      for (int64_t j = 0; j < s_.support; ++j) {
        pairs[i * width_ + j] = half[i * width_ + j] + half[j * width_ + i];
      }
    }
    multiply<value_t>(s_.support, s_.features, s_.support, {pairs.data(), width_}, x, out, true);
  }

  const LinearHeadShape s_;
  const LinearHeadOptions o_;
  const int64_t width_, lanes_, head_;  // of a row, of [N, S], of [N, D]
  const HeadLossLanes<value_t> loss_;
  Buffer<value_t> factor_, wanted_, start_, outputs_, product_, gram_;
  Buffer<value_t> coefficients_, residuals_, shares_;  // C_0 .. C_K, G_k, c_0 .. c_K
};

}  // namespace fastmeta
