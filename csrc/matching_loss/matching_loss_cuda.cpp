// CUDA implementation of matching_loss: tensors to launchers.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <string_view>
#include <tuple>
#include <utility>

#include "common/cuda/cuda_check.h"
#include "matching_loss/arguments.h"
#include "matching_loss/matching_loss.h"

namespace fastmeta {
namespace {

// check_classes_of_queries() for labels on a GPU, contiguous, unless these have passed it before. A
// stream being captured cannot wait for an answer.
void check_classes_once(const at::Tensor& query_labels, const at::Tensor& support_labels,
                        bool exclude_self) {
  if (query_labels.numel() == 0 || is_being_captured()) return;
  const auto check = [&] {
    check_classes_of_queries(query_labels.cpu(), support_labels.cpu(), exclude_self);
  };
  if (!LabelsInRange::can_be_known(query_labels) || !LabelsInRange::can_be_known(support_labels)) {
    return check();
  }
  // Before the check: a write during it is a later version.
  SupportedLabels now{LabelsInRange(query_labels, {kAnyLabel}),
                      LabelsInRange(support_labels, {kAnyLabel}), exclude_self};
  auto& checked = LastChecked<SupportedLabels>::instance();
  if (checked.has(now)) return;
  check();
  checked.add(std::move(now));
}

struct Arguments {
  at::Tensor query, query_labels, support, support_labels;  // contiguous
  MatchingOperands operands;                                // pointers into them
};

// Prepares arguments on the current device; raises ValueError for labels that are wrong.
Arguments prepared(const at::Tensor& query, const at::Tensor& query_labels,
                   const at::Tensor& support, const at::Tensor& support_labels,
                   std::string_view metric, double scale, bool exclude_self) {
  const PairwiseShape shape =
      checked_matching_shape(query, query_labels, support, support_labels, exclude_self);
  Arguments a{query.contiguous(),
              query_labels.contiguous(),
              support.contiguous(),
              support_labels.contiguous(),
              {}};
  if (check_cuda_label_range(a.query_labels, kAnyLabel, "query_labels")) {
    a.query = without_absent(a.query, a.query_labels);
  }
  if (check_cuda_label_range(a.support_labels, kAnyLabel, "support_labels")) {
    a.support = without_absent(a.support, a.support_labels);
  }
  check_classes_once(a.query_labels, a.support_labels, exclude_self);
  const PairwiseOperands pairwise{dtype_of(query), checked_metric(metric), shape,
                                  a.query.const_data_ptr(), a.support.const_data_ptr()};
  a.operands = {pairwise, a.query_labels.const_data_ptr<int64_t>(),
                a.support_labels.const_data_ptr<int64_t>(), scale, exclude_self};
  return a;
}

at::Tensor matching_loss_cuda(const at::Tensor& query, const at::Tensor& query_labels,
                              const at::Tensor& support, const at::Tensor& support_labels,
                              std::string_view metric, double scale, bool exclude_self) {
  const c10::cuda::CUDAGuard guard(query.device());
  const auto a =
      prepared(query, query_labels, support, support_labels, metric, scale, exclude_self);
  auto loss = at::empty(query_labels.sizes(), wide_options(query));
  if (loss.numel() == 0) return loss;
  const auto workspace = scratch(matching_loss_workspace(a.operands), query);
  check_launch(launch_matching_loss(a.operands, loss.mutable_data_ptr(),
                                    workspace.mutable_data_ptr(), current_stream()),
               "matching_loss");
  return loss;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> matching_loss_backward_cuda(
    const at::Tensor& weight, const at::Tensor& query, const at::Tensor& query_labels,
    const at::Tensor& support, const at::Tensor& support_labels, std::string_view metric,
    double scale, bool exclude_self) {
  check_shape(weight, query_labels.sizes(), "weight");
  check_wide(weight, query, "weight");
  const c10::cuda::CUDAGuard guard(query.device());
  const auto a =
      prepared(query, query_labels, support, support_labels, metric, scale, exclude_self);
  const auto weights = weight.contiguous();
  auto loss = at::empty(query_labels.sizes(), wide_options(query));
  // The gradient's kernels need a distance.
  if (loss.numel() == 0 || support.size(1) == 0) {
    return {matching_loss_cuda(query, query_labels, support, support_labels, metric, scale,
                               exclude_self),
            at::zeros(query.sizes(), query.options()),
            at::zeros(support.sizes(), support.options())};
  }
  auto grad_query = at::empty(query.sizes(), query.options());
  auto grad_support = at::empty(support.sizes(), support.options());
  const auto workspace = scratch(matching_loss_backward_workspace(a.operands), query);
  check_launch(
      launch_matching_loss_backward(a.operands, weights.const_data_ptr(), loss.mutable_data_ptr(),
                                    grad_query.mutable_data_ptr(), grad_support.mutable_data_ptr(),
                                    workspace.mutable_data_ptr(), current_stream()),
      "matching_loss_backward");
  return {loss, grad_query, grad_support};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastmeta, CUDA, m) {
  m.impl("matching_loss", &matching_loss_cuda);
  m.impl("matching_loss_backward", &matching_loss_backward_cuda);
}

}  // namespace fastmeta
