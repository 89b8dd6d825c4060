#pragma once

#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>

namespace fastmeta {

// target [columns, rows] = source' for source [rows, columns], in blocks that fit the registers.
template <typename value_t>
void transpose(int64_t rows, int64_t columns, const value_t* source, int64_t source_stride,
               value_t* target, int64_t target_stride) {
  constexpr int64_t kBlock = at::vec::Vectorized<value_t>::size();
  for (int64_t i = 0; i < rows; i += kBlock) {
    for (int64_t j = 0; j < columns; j += kBlock) {
      at::vec::transpose_mxn<value_t>(source + i * source_stride + j, source_stride,
                                      target + j * target_stride + i, target_stride,
                                      static_cast<int>(std::min(kBlock, rows - i)),
                                      static_cast<int>(std::min(kBlock, columns - j)));
    }
  }
}

}  // namespace fastmeta
