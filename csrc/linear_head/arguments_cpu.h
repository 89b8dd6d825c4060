// Arguments of linear_head's CPU kernels: checked tensors, and each task's part of them.
#pragma once

#include <optional>
#include <string_view>

#include "common/labels.h"
#include "linear_head/arguments.h"
#include "linear_head/head_cpu.h"

namespace fastmeta {

// An array of each task as acc_t: in place if it has this type.
template <typename scalar_t>
class WideArray {
 public:
  explicit WideArray(int64_t count) : count_(count), scratch_(is_reduced<scalar_t> ? count : 0) {}

  const acc_t<scalar_t>* read(const scalar_t* source) {
    return source == nullptr ? nullptr : widen(source, scratch_.data(), count_);
  }
  acc_t<scalar_t>* target(scalar_t* target) {
    return target == nullptr ? nullptr : widened_target(target, scratch_.data());
  }
  void write(scalar_t* target) {
    if constexpr (is_reduced<scalar_t>) {
      if (target != nullptr) narrow(scratch_.data(), target, count_);
    }
  }

 private:
  int64_t count_;
  Buffer<acc_t<scalar_t>> scratch_;
};

template <typename scalar_t>
struct HeadSource {
  const scalar_t *x, *weight, *bias, *targets;
  const int64_t* labels;
  const acc_t<scalar_t>* lr;
};

template <typename scalar_t>
class HeadInputs {
 public:
  explicit HeadInputs(const LinearHeadShape& s)
      : x_(s.support * s.features),
        weight_(s.ways * s.features),
        bias_(s.ways),
        targets_(s.support * s.ways) {}

  HeadTask<acc_t<scalar_t>> read(const HeadSource<scalar_t>& task) {
    return {x_.read(task.x), weight_.read(task.weight),   bias_.read(task.bias),
            task.lr,         targets_.read(task.targets), task.labels};
  }

 private:
  WideArray<scalar_t> x_, weight_, bias_, targets_;
};

struct HeadArguments {
  LinearHeadShape shape;
  LinearHeadOptions options;
  at::Tensor x, targets, weight, bias, lr;  // tasks contiguous

  template <typename scalar_t>
  HeadSource<scalar_t> task(int64_t t) const {
    const auto& s = shape;
    const bool has_labels = options.loss != HeadLoss::kMse;
    return {x.const_data_ptr<scalar_t>() + t * s.support * s.features,
            // Tasks may share one start by stride 0.
            weight.const_data_ptr<scalar_t>() + t * weight.stride(0),
            options.has_bias ? bias.const_data_ptr<scalar_t>() + t * s.ways : nullptr,
            has_labels ? nullptr : targets.const_data_ptr<scalar_t>() + t * s.support * s.ways,
            has_labels ? targets.const_data_ptr<int64_t>() + t * s.support : nullptr,
            lr.const_data_ptr<acc_t<scalar_t>>() + t * s.steps};
  }
};

inline HeadArguments checked_head(const at::Tensor& x, const at::Tensor& targets,
                                  const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                                  const at::Tensor& lr, std::string_view loss, double weight_decay,
                                  bool dual, const char* name = "targets") {
  const HeadLoss kind = checked_head_loss(loss);
  const auto shape = checked_head_shape(x, targets, weight, bias, lr, kind);
  const LinearHeadOptions options{kind, weight_decay, dual, bias.has_value()};
  HeadArguments a{shape,
                  options,
                  x.contiguous(),
                  targets.contiguous(),
                  with_contiguous_tasks(weight),
                  bias ? bias->contiguous() : at::Tensor(),
                  lr.contiguous()};
  if (kind != HeadLoss::kMse && check_label_range(a.targets, label_classes(kind, shape), name)) {
    a.x = without_absent(a.x, a.targets);
  }
  return a;
}

// Gradients of a task where they are written to, and the buffers they pass through.
template <typename scalar_t>
class HeadOutputs {
 public:
  HeadOutputs(const LinearHeadShape& s, bool has_x)
      : x_(has_x ? s.support * s.features : 0),
        weight_(s.ways * s.features),
        bias_(s.ways),
        targets_(s.support * s.ways) {}

  HeadGradients<acc_t<scalar_t>> targets(const HeadGradients<scalar_t>& to, acc_t<scalar_t>* lr) {
    return {x_.target(to.x), weight_.target(to.weight), bias_.target(to.bias), lr,
            targets_.target(to.targets)};
  }
  void write(const HeadGradients<scalar_t>& to) {
    x_.write(to.x);
    weight_.write(to.weight);
    bias_.write(to.bias);
    targets_.write(to.targets);
  }

 private:
  WideArray<scalar_t> x_, weight_, bias_, targets_;
};

// A task's part of the gradient tensors, except the gradient of lr; null if absent.
template <typename scalar_t>
HeadGradients<scalar_t> head_gradients_of(const HeadGradientTensors& to, int64_t t) {
  const auto part = [t](const at::Tensor& x) -> scalar_t* {
    // An absent gradient has no elements.
    if (x.numel() == 0) return nullptr;
    return x.mutable_data_ptr<scalar_t>() + t * (x.numel() / x.size(0));
  };
  const auto& [x, targets, weight, bias, lr] = to;
  return {part(x), part(weight), part(bias), nullptr, part(targets)};
}

}  // namespace fastmeta
