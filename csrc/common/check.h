// Checks that memory safety needs of an op's arguments. The public Python function checks
// everything a user can get wrong, with the better message.
#pragma once

#include <ATen/OpMathType.h>
#include <ATen/core/Tensor.h>

#include "common/dtype.h"

namespace fastmeta {

inline Dtype dtype_of(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return Dtype::kFloat;
    case at::kDouble:
      return Dtype::kDouble;
    case at::kHalf:
      return Dtype::kHalf;
    case at::kBFloat16:
      return Dtype::kBfloat16;
    default:
      TORCH_CHECK_TYPE(false, "expected float32, float64, float16 or bfloat16, got ",
                       x.scalar_type());
  }
}

inline void check_same(const at::Tensor& a, const at::Tensor& b, const char* what) {
  TORCH_CHECK(a.scalar_type() == b.scalar_type() && a.device() == b.device(), what,
              ": expected one dtype and device, got ", a.scalar_type(), " on ", a.device(), " and ",
              b.scalar_type(), " on ", b.device());
}

inline void check_shape(const at::Tensor& x, at::IntArrayRef shape, const char* name) {
  TORCH_CHECK(x.sizes() == shape, name, ": expected shape ", shape, ", got ", x.sizes());
}

inline void check_dims(const at::Tensor& x, int64_t dims, const char* name) {
  TORCH_CHECK(x.dim() == dims, name, ": expected ", dims, " dimensions, got shape ", x.sizes());
}

inline void check_labels(const at::Tensor& labels, const at::Tensor& x, const char* name) {
  TORCH_CHECK(labels.scalar_type() == at::kLong && labels.device() == x.device(), name,
              ": expected int64 on ", x.device(), ", got ", labels.scalar_type(), " on ",
              labels.device());
}

// Options of per-query and step-size tensors: the accumulation type of `x`, float for bfloat16 and
// half.
inline at::TensorOptions wide_options(const at::Tensor& x) {
  return x.options().dtype(at::toOpMathType(x.scalar_type()));
}

inline void check_wide(const at::Tensor& wide, const at::Tensor& x, const char* name) {
  const auto type = at::toOpMathType(x.scalar_type());
  TORCH_CHECK(wide.scalar_type() == type && wide.device() == x.device(), name, ": expected ", type,
              " on ", x.device(), ", got ", wide.scalar_type(), " on ", wide.device());
}

// Returns `x` itself if its rows are contiguous (the task dimension may be expanded), else a copy.
inline at::Tensor with_contiguous_rows(const at::Tensor& x) {
  return x.numel() == 0 || x.stride(-1) == 1 || x.size(-1) == 1 ? x : x.contiguous();
}

// Returns `x` itself if each task's part is contiguous (the task dimension may be expanded), else a
// copy.
inline at::Tensor with_contiguous_tasks(const at::Tensor& x) {
  return x.numel() == 0 || x.select(0, 0).is_contiguous() ? x : x.contiguous();
}

}  // namespace fastmeta
