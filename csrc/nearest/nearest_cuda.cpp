// CUDA implementation of nearest: tensors to launchers.
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "common/cuda/cuda_check.h"
#include "nearest/arguments.h"
#include "nearest/nearest.h"

namespace fastmeta {
namespace {

std::tuple<at::Tensor, at::Tensor> nearest_cuda(const at::Tensor& x, const at::Tensor& y,
                                                const std::optional<at::Tensor>& present, int64_t k,
                                                std::string_view metric_name) {
  const Metric metric = checked_metric(metric_name);
  const PairwiseShape shape = checked_nearest_shape(x, y, present, k);
  const c10::cuda::CUDAGuard guard(x.device());
  const auto rows = x.contiguous(), columns = y.contiguous();
  const auto mask = present.has_value() ? present->contiguous() : at::Tensor();
  auto distances = at::empty({shape.tasks, shape.queries, k}, x.options());
  auto indices = at::empty(distances.sizes(), x.options().dtype(at::kLong));
  if (distances.numel() == 0) return {distances, indices};
  const NearestOperands operands{
      {dtype_of(x), metric, shape, rows.const_data_ptr(), columns.const_data_ptr()},
      mask.defined() ? mask.const_data_ptr<bool>() : nullptr,
      k};
  const auto workspace = scratch(nearest_workspace(operands), x);
  check_launch(
      launch_nearest(operands, distances.mutable_data_ptr(), indices.mutable_data_ptr<int64_t>(),
                     workspace.mutable_data_ptr(), current_stream()),
      "nearest");
  return {distances, indices};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastmeta, CUDA, m) { m.impl("nearest", &nearest_cuda); }

}  // namespace fastmeta
