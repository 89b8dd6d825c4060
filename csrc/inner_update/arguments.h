// Argument checks of inner_update on every device.
#pragma once

#include "common/check.h"
#include "inner_update/inner_update.h"

namespace fastmeta {

// params (backward: grad_out) and grads have contiguous rows, lr is contiguous.
inline InnerUpdateShape checked_inner_update_shape(const at::Tensor& params,
                                                   const at::Tensor& grads, const at::Tensor& lr) {
  check_dims(params, 2, "params");
  check_shape(grads, params.sizes(), "grads");
  check_same(params, grads, "params and grads");
  const int64_t tasks = params.size(0), parameters = params.size(1);
  TORCH_CHECK(lr.dim() == 2 && (lr.size(0) == 1 || lr.size(0) == tasks) &&
                  (lr.size(1) == 1 || lr.size(1) == parameters),
              "lr: expected shape [1 or T, 1 or P], got ", lr.sizes());
  check_wide(lr, params, "lr");
  return {tasks,
          parameters,
          params.stride(0),
          grads.stride(0),
          lr.size(0) == 1 ? 0 : lr.size(1),
          lr.size(1) == 1 ? 0 : 1};
}

}  // namespace fastmeta
