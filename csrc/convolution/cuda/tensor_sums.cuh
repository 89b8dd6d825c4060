// Sums of a tile as in ThreadSums, but by tensor cores: operands are float rounded to TF32, or half
// types; products and sums are float32. A warp owns 8 kM x 4 kN of the tile. Rows of a slice are
// kWidth words apart, so that no two of its accesses fall into one bank.
#pragma once

#include "common/cuda/mma.cuh"
#include "execution/cuda/grid_product.cuh"

namespace fastmeta {

template <typename T, typename value_t>  // tensor cores need deeper slices
using DeepTile =
    ProductTile<T::kRows, T::kColumns, 16 * kInWord<value_t>, T::kM, T::kN, T::kBlocks>;

template <typename value_t, typename Tile>
struct TensorSums {
  static constexpr int kGroup = 2, kWords = Tile::kDepth / kInWord<value_t>;
  static constexpr int kWarpRows = 8 * Tile::kM, kWarpColumns = 4 * Tile::kN;
  static constexpr int kWarpsAcross = Tile::kColumns / kWarpColumns;
  static_assert(Tile::kM % 2 == 0 && Tile::kN % 2 == 0 && kWords % kMmaWords == 0);
  static_assert(Tile::kRows % kWarpRows == 0 && Tile::kColumns % kWarpColumns == 0);
  // 4 rows of k, 8 words apart, and 8 neighbours in each: 32 banks.
  static_assert(Tile::kWidth % kWarp == 8);

  float sum[Tile::kM][Tile::kN] = {};

  static __device__ int warp_row() { return threadIdx.x / kWarp / kWarpsAcross * kWarpRows; }
  static __device__ int warp_column() { return threadIdx.x / kWarp % kWarpsAcross * kWarpColumns; }
  static __device__ int lane_row() { return threadIdx.x % kWarp / 4; }
  static __device__ int lane_column() { return threadIdx.x % 4; }

  // Layout of D in mma.cuh: two sums of an instruction are 8 rows apart.
  static __device__ int row(int i) { return warp_row() + i / 2 * 16 + i % 2 * 8 + lane_row(); }
  static __device__ int column(int j) {
    return warp_column() + j / 2 * 8 + lane_column() * 2 + j % 2;
  }
  static __device__ int row_lane() { return warp_row() / Tile::kM + lane_row(); }

  __device__ Pack<float, kGroup> group(int i, int j) const {
    Pack<float, kGroup> numbers;
    numbers[0] = sum[i][j];
    numbers[1] = sum[i][j + 1];
    return numbers;
  }

  __device__ void add(const value_t* slice) {
    constexpr int kHalf = kMmaWords / 2 * Tile::kWidth;
    // A word has two neighbours in k of a half type, as the instruction wants them.
    const auto* words = as_packs<kInWord<value_t>>(slice);
#pragma unroll
    for (int k = 0; k < kWords; k += kMmaWords) {
      const auto* row_of_k = words + (k + lane_column()) * Tile::kWidth + lane_row();
      const auto* left = row_of_k + warp_row();
      const auto* right = row_of_k + Tile::kRows + Tile::kPad + warp_column();
      MmaWord<value_t> a[Tile::kM / 2][4], b[Tile::kN / 2][2];
#pragma unroll
      for (int i = 0; i < Tile::kM / 2; ++i) {
#pragma unroll
        for (int part = 0; part < 4; ++part) {
          a[i][part] = mma_word(left[i * 16 + part % 2 * 8 + part / 2 * kHalf]);
        }
      }
#pragma unroll
      for (int j = 0; j < Tile::kN / 2; ++j) {
        b[j][0] = mma_word(right[j * 8]);
        b[j][1] = mma_word(right[j * 8 + kHalf]);
      }
#pragma unroll
      for (int i = 0; i < Tile::kM / 2; ++i) {
#pragma unroll
        for (int j = 0; j < Tile::kN / 2; ++j) {
          multiply_add(sum[2 * i][2 * j], sum[2 * i][2 * j + 1], sum[2 * i + 1][2 * j],
                       sum[2 * i + 1][2 * j + 1], a[i], b[j]);
        }
      }
    }
  }
};

}  // namespace fastmeta
