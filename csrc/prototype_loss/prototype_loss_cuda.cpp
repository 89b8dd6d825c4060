// CUDA implementation of prototype_loss: tensors to launchers.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <string_view>
#include <tuple>

#include "common/cuda/cuda_check.h"
#include "prototype_loss/arguments.h"
#include "prototype_loss/prototype_loss.h"

namespace fastmeta {
namespace {

struct Arguments {
  at::Tensor query, labels, prototypes;  // contiguous
  LossOperands operands;                 // pointers into them
};

// Prepares arguments on the current device; raises ValueError for a label out of range.
Arguments prepared(const PairwiseShape& shape, const at::Tensor& query, const at::Tensor& labels,
                   const at::Tensor& prototypes, std::string_view metric, double scale) {
  Arguments a{query.contiguous(), labels.contiguous(), prototypes.contiguous(), {}};
  if (check_cuda_label_range(a.labels, shape.classes, "query_labels")) {
    a.query = without_absent(a.query, a.labels);
  }
  const PairwiseOperands pairwise{dtype_of(query), checked_metric(metric), shape,
                                  a.query.const_data_ptr(), a.prototypes.const_data_ptr()};
  a.operands = {pairwise, a.labels.const_data_ptr<int64_t>(), scale};
  return a;
}

at::Tensor prototype_loss_cuda(const at::Tensor& query, const at::Tensor& labels,
                               const at::Tensor& prototypes, std::string_view metric,
                               double scale) {
  const auto shape = checked_loss_shape(query, labels, prototypes);
  const c10::cuda::CUDAGuard guard(query.device());
  const auto a = prepared(shape, query, labels, prototypes, metric, scale);
  auto loss = at::empty(labels.sizes(), wide_options(query));
  if (loss.numel() == 0) return loss;
  const auto workspace = scratch(prototype_loss_workspace(a.operands), query);
  check_launch(launch_prototype_loss(a.operands, loss.mutable_data_ptr(),
                                     workspace.mutable_data_ptr(), current_stream()),
               "prototype_loss");
  return loss;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> prototype_loss_backward_cuda(
    const at::Tensor& weight, const at::Tensor& query, const at::Tensor& labels,
    const at::Tensor& prototypes, std::string_view metric, double scale) {
  const auto shape = checked_loss_shape(query, labels, prototypes);
  check_shape(weight, labels.sizes(), "weight");
  check_wide(weight, query, "weight");
  const c10::cuda::CUDAGuard guard(query.device());
  const auto a = prepared(shape, query, labels, prototypes, metric, scale);
  const auto weights = weight.contiguous();
  auto loss = at::empty(labels.sizes(), wide_options(query));
  auto grad_query = at::empty(query.sizes(), query.options());
  if (loss.numel() == 0) {
    return {loss, grad_query, at::zeros(prototypes.sizes(), prototypes.options())};
  }
  auto grad_prototypes = at::empty(prototypes.sizes(), prototypes.options());
  const auto workspace = scratch(prototype_loss_backward_workspace(a.operands), query);
  check_launch(launch_prototype_loss_backward(
                   a.operands, weights.const_data_ptr(), loss.mutable_data_ptr(),
                   grad_query.mutable_data_ptr(), grad_prototypes.mutable_data_ptr(),
                   workspace.mutable_data_ptr(), current_stream()),
               "prototype_loss_backward");
  return {loss, grad_query, grad_prototypes};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastmeta, CUDA, m) {
  m.impl("prototype_loss", &prototype_loss_cuda);
  m.impl("prototype_loss_backward", &prototype_loss_backward_cuda);
}

}  // namespace fastmeta
