#pragma once

#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>

namespace fastmeta {

// Transposes a block that fits the registers. Its sizes are constants: else it would go through
// memory.
template <int rows, int columns, typename value_t>
[[gnu::flatten]] inline void transpose_block(const value_t* source, int64_t source_stride,
                                             value_t* target, int64_t target_stride) {
  at::vec::transpose_mxn<value_t>(source, source_stride, target, target_stride, rows, columns);
}

// Computes target [columns, rows] = source' for source [rows, columns].
template <typename value_t>
void transpose(int64_t rows, int64_t columns, const value_t* source, int64_t source_stride,
               value_t* target, int64_t target_stride) {
  constexpr int kBlock = at::vec::Vectorized<value_t>::size();
  constexpr int kTaps = 9 % kBlock;  // the last columns of weights of 3 x 3 taps
  for (int64_t i = 0; i < rows; i += kBlock) {
    for (int64_t j = 0; j < columns; j += kBlock) {
      const auto* from = source + i * source_stride + j;
      auto* to = target + j * target_stride + i;
      const int height = static_cast<int>(std::min<int64_t>(kBlock, rows - i));
      const int width = static_cast<int>(std::min<int64_t>(kBlock, columns - j));
      if (height == kBlock && width == kBlock) {
        transpose_block<kBlock, kBlock>(from, source_stride, to, target_stride);
      } else if (height == kBlock && width == kTaps) {
        transpose_block<kBlock, kTaps>(from, source_stride, to, target_stride);
      } else {
        at::vec::transpose_mxn<value_t>(from, source_stride, to, target_stride, height, width);
      }
    }
  }
}

}  // namespace fastmeta
