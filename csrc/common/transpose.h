#pragma once

#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>

namespace fastmeta {

// Of a block that fits the registers. Its sizes must be constants, or it goes through memory.
template <typename value_t>
[[gnu::flatten]] inline void transpose_block(const value_t* source, int64_t source_stride,
                                             value_t* target, int64_t target_stride) {
  constexpr int kBlock = at::vec::Vectorized<value_t>::size();
  at::vec::transpose_mxn<value_t>(source, source_stride, target, target_stride, kBlock, kBlock);
}

// target [columns, rows] = source' for source [rows, columns].
template <typename value_t>
void transpose(int64_t rows, int64_t columns, const value_t* source, int64_t source_stride,
               value_t* target, int64_t target_stride) {
  constexpr int64_t kBlock = at::vec::Vectorized<value_t>::size();
  for (int64_t i = 0; i < rows; i += kBlock) {
    for (int64_t j = 0; j < columns; j += kBlock) {
      const auto* from = source + i * source_stride + j;
      auto* to = target + j * target_stride + i;
      if (rows - i >= kBlock && columns - j >= kBlock) {
        transpose_block(from, source_stride, to, target_stride);
      } else {
        at::vec::transpose_mxn<value_t>(from, source_stride, to, target_stride,
                                        static_cast<int>(std::min(kBlock, rows - i)),
                                        static_cast<int>(std::min(kBlock, columns - j)));
      }
    }
  }
}

}  // namespace fastmeta
