// CUDA implementation of pair_pool: tensors to launchers.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <cstdint>
#include <limits>
#include <tuple>

#include "common/cuda/cuda_check.h"
#include "pair_pool/arguments.h"

namespace fastmeta {
namespace {

using at::Tensor;

// The kernels count a map's numbers in 32 bits.
void check_map_size(const PairPoolShape& shape) {
  TORCH_CHECK(shape.numbers() <= std::numeric_limits<uint32_t>::max(),
              "x and y: expected fewer than 2^32 numbers a map on a GPU, got ", shape.numbers());
}

std::tuple<Tensor, Tensor> pair_pool_cuda(const Tensor& x, const Tensor& y, int64_t pool) {
  const auto shape = checked_pair_pool_shape(x, y, pool);
  check_map_size(shape);
  const c10::cuda::CUDAGuard guard(x.device());
  const auto maps = x.contiguous(), others = y.contiguous();
  auto pooled = at::empty(pooled_sizes(shape), x.options());
  auto place = at::empty(pooled_sizes(shape), x.options().dtype(at::kByte));
  if (pooled.numel() == 0) return {pooled, place};
  check_launch(launch_pair_pool(dtype_of(x), shape, maps.const_data_ptr(), others.const_data_ptr(),
                                pooled.mutable_data_ptr(), place.mutable_data_ptr<uint8_t>(),
                                current_stream()),
               "pair_pool");
  return {pooled, place};
}

Tensor pair_pool_gather_cuda(const Tensor& x, const Tensor& y, const Tensor& place, int64_t pool) {
  const auto shape = checked_pair_pool_shape(x, y, pool);
  check_map_size(shape);
  check_pair_pool_place(place, x, pooled_sizes(shape));
  const c10::cuda::CUDAGuard guard(x.device());
  const auto maps = x.contiguous(), others = y.contiguous(), index = place.contiguous();
  auto out = at::empty(pooled_sizes(shape), x.options());
  if (out.numel() == 0) return out;
  check_launch(launch_pair_pool_gather(dtype_of(x), shape, maps.const_data_ptr(),
                                       others.const_data_ptr(), index.const_data_ptr<uint8_t>(),
                                       out.mutable_data_ptr(), current_stream()),
               "pair_pool_gather");
  return out;
}

std::tuple<Tensor, Tensor> pair_pool_backward_cuda(const Tensor& grad_pooled, const Tensor& place,
                                                   at::IntArrayRef size, int64_t pool) {
  const auto s = checked_pair_pool_backward_shape(grad_pooled, place, size, pool);
  check_map_size(s);
  const c10::cuda::CUDAGuard guard(grad_pooled.device());
  const auto grad = grad_pooled.contiguous(), index = place.contiguous();
  const auto options = grad.options();
  auto grad_x = at::zeros({s.tasks, s.queries, s.channels, s.height, s.width}, options);
  auto grad_y = at::zeros({s.tasks, s.classes, s.channels, s.height, s.width}, options);
  if (grad.numel() == 0) return {grad_x, grad_y};
  check_launch(launch_pair_pool_backward(dtype_of(grad), s, grad.const_data_ptr(),
                                         index.const_data_ptr<uint8_t>(), grad_x.mutable_data_ptr(),
                                         grad_y.mutable_data_ptr(), current_stream()),
               "pair_pool_backward");
  return {grad_x, grad_y};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastmeta, CUDA, m) {
  m.impl("pair_pool", &pair_pool_cuda);
  m.impl("pair_pool_backward", &pair_pool_backward_cuda);
  m.impl("pair_pool_gather", &pair_pool_gather_cuda);
}

}  // namespace fastmeta
