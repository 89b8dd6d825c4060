// Argument checks of pair_pool on every device.
#pragma once

#include <array>

#include "common/check.h"
#include "pair_pool/pair_pool.h"

namespace fastmeta {

inline PairPoolShape checked_pair_pool_shape(int64_t tasks, int64_t queries, int64_t classes,
                                             int64_t channels, int64_t height, int64_t width,
                                             int64_t pool) {
  TORCH_CHECK(pool >= 1 && pool <= kMostPool && pool <= height && pool <= width,
              "pool: expected 1 to ", kMostPool, " and at most the maps' height and width, got ",
              pool, " for maps ", height, " x ", width);
  return {tasks, queries, classes, channels, height, width, pool};
}

inline PairPoolShape checked_pair_pool_shape(const at::Tensor& x, const at::Tensor& y,
                                             int64_t pool) {
  check_dims(x, 5, "x");
  check_dims(y, 5, "y");
  check_same(x, y, "x and y");
  TORCH_CHECK(
      x.size(0) == y.size(0) && x.sizes().slice(2) == y.sizes().slice(2),
      "x and y: expected [T, Q, C, H, W] and [T, N, C, H, W] with the same T, C, H and W, got ",
      x.sizes(), " and ", y.sizes());
  return checked_pair_pool_shape(x.size(0), x.size(1), y.size(1), x.size(2), x.size(3), x.size(4),
                                 pool);
}

inline void check_pair_pool_place(const at::Tensor& place, const at::Tensor& like,
                                  at::IntArrayRef sizes) {
  TORCH_CHECK(place.scalar_type() == at::kByte && place.device() == like.device(),
              "place: expected uint8 on ", like.device(), ", got ", place.scalar_type(), " on ",
              place.device());
  check_shape(place, sizes, "place");
}

// Shape of a gradient of maps of height and width `size`.
inline PairPoolShape checked_pair_pool_backward_shape(const at::Tensor& grad_pooled,
                                                      const at::Tensor& place, at::IntArrayRef size,
                                                      int64_t pool) {
  check_dims(grad_pooled, 6, "grad_pooled");
  TORCH_CHECK(size.size() == 2, "size: expected a height and a width, got ", size);
  const auto shape =
      checked_pair_pool_shape(grad_pooled.size(0), grad_pooled.size(1), grad_pooled.size(2),
                              grad_pooled.size(3), size[0], size[1], pool);
  TORCH_CHECK(grad_pooled.size(4) == shape.rows() && grad_pooled.size(5) == shape.columns(),
              "grad_pooled: expected pooled maps ", shape.rows(), " x ", shape.columns(), ", got ",
              grad_pooled.sizes());
  check_pair_pool_place(place, grad_pooled, grad_pooled.sizes());
  return shape;
}

inline std::array<int64_t, 6> pooled_sizes(const PairPoolShape& s) {
  return {s.tasks, s.queries, s.classes, s.channels, s.rows(), s.columns()};
}

}  // namespace fastmeta
