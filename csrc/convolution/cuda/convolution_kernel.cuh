// Convolutions of all tasks as matrix products whose operands are patches of images; see
// patches.cuh.
// A block owns a tile of a task's C and all or a split of the sum; a thread 4 x 4, 8 x 4 or 8 x 8
// sums, as in execution/cuda/grid_product.cuh. Both pairs go into the same sums.
// No array of patches is in global memory: it would be taps times as large as the images. float32
// is IEEE's, or TF32 in tensor cores if allowed; half types are summed in float32 in tensor cores.
#pragma once

#include "convolution/cuda/launch.cuh"
#include "convolution/cuda/patches.cuh"
#include "convolution/cuda/tensor_sums.cuh"

namespace fastmeta {

// Large tiles serve float only: for double the registers do not suffice.
using LargeImageTile = ProductTile<128, 64, 8, 8, 8, 3>;
using NarrowImageTile = ProductTile<128, 32, 8, 8, 4, 2>;  // for few channels
using SmallImageTile = SmallProduct;
using LargeWeightTile = ProductTile<64, 128, 8, 8, 8, 3>;
using ShortWeightTile = ProductTile<32, 128, 8, 4, 8, 2>;   // for few outputs
using NarrowWeightTile = ProductTile<64, 32, 16, 4, 4, 4>;  // for few channels
using SmallWeightTile = SmallProduct;

template <typename value_t>
struct GridConvolution {
  GridProduct<value_t> g;
  ConvSizes sizes;
  bool wide;                      // kPatchPack channels can be read at once
  Array<acc_t<value_t>> moments;  // [row tiles, 2, n], or null
};

template <MapTo to, typename Sums, typename Tile, typename value_t>
__device__ Sums convolution_sums(const GridConvolution<value_t>& c,
                                 const ProductPlace<Tile>& place) {
  const auto& p = c.g.p;
  if constexpr (to == MapTo::kWeight) {
    // dz is a plain matrix; only x has patches.
    OperandSlices<value_t, Tile::kRows, Tile::kDepth, Tile::kThreads> a(false, place.row, p.m, p.k);
    PatchColumns<value_t, Tile> b(c.sizes, c.wide, place.column, p.k);
    return sums_of_slices<Sums>(c.g, place, a, b);
  } else {
    PatchRows<value_t, to, Tile> a(c.sizes, c.wide, place.row, p.m);
    WeightColumns<value_t, to, Tile> b(c.sizes, place.column);
    return sums_of_slices<Sums>(c.g, place, a, b);
  }
}

// Stores weights, summed as [O, taps, C], as [O, C, taps].
template <typename value_t, int count>
__device__ void store_weights(const ProductTarget<value_t>& target, const ConvSizes& sizes,
                              int64_t row, int64_t column,
                              const Pack<acc_t<value_t>, count>& numbers) {
#pragma unroll
  for (int j = 0; j < count; ++j) {
    if (column + j >= target.n) return;
    const int tap = int(column + j) / sizes.channels, channel = int(column + j) % sizes.channels;
    value_t* place = target.c + row * target.n + channel * sizes.taps() + tap;
    // Scattered stores: neighbours in memory are taps, neighbours in the tile channels.
    const auto sum = target.adds ? widen(*place) + target.factor * numbers[j] : numbers[j];
    *place = narrow<value_t>(sum);
  }
}

// Moments of each column of the tile: first of a thread's own sums, then merged over the lanes that
// share its columns.
template <typename Tile, typename value_t, typename Sums>
__device__ void store_moments(const GridConvolution<value_t>& c, const ProductPlace<Tile>& place,
                              const Sums& sums) {
  constexpr int kLanes = Tile::kRows / Tile::kM;
  __shared__ ChannelMoments<value_t> lanes[kLanes][Tile::kColumns];
  const auto& p = c.g.p;
  value_t count = 0;
#pragma unroll
  for (int i = 0; i < Tile::kM; ++i) count += place.row + Sums::row(i) < p.m ? 1 : 0;
#pragma unroll
  for (int j = 0; j < Tile::kN; ++j) {
    ChannelMoments<value_t> own{0, 0, count};
#pragma unroll
    for (int i = 0; i < Tile::kM; ++i) own.first += sums.sum[i][j];  // 0 past the end
    // A thread whose rows all lie past the end has count 0, and merges as nothing.
    own.first /= count > 0 ? count : value_t(1);
#pragma unroll
    for (int i = 0; i < Tile::kM; ++i) {
      const value_t distance = sums.sum[i][j] - own.first;
      own.second += place.row + Sums::row(i) < p.m ? distance * distance : value_t(0);
    }
    lanes[Sums::row_lane()][Sums::column(j)] = own;
  }
  __syncthreads();
  const int64_t column = place.column + threadIdx.x;
  if (threadIdx.x >= Tile::kColumns || column >= p.n) return;
  ChannelMoments<value_t> moments = lanes[0][threadIdx.x];
  // In the order of lanes, so that the bits are fixed.
  for (int lane = 1; lane < kLanes; ++lane) moments.merge(lanes[lane][threadIdx.x]);
  value_t* target = c.moments.data + place.task * c.moments.task_stride +
                    place.row / Tile::kRows * 2 * p.n + column;
  target[0] = moments.first;
  target[p.n] = moments.second;
}

template <MapTo to, typename Sums, typename Tile, typename value_t>
__global__ void __launch_bounds__(Tile::kThreads, sizeof(value_t) == 4 ? 3 : 2)
    convolution_kernel(GridConvolution<value_t> c) {
  const ProductPlace<Tile> place(c.g);
  const ProductTarget<value_t> target(c.g, place.task, place.split);
  const Sums sums = convolution_sums<to, Sums>(c, place);
  // Parts of split weights stay [O, taps, C]; SumOfConvolution transposes them.
  const bool in_place = to == MapTo::kWeight && c.g.splits == 1;
#pragma unroll
  for (int i = 0; i < Tile::kM; ++i) {
    const int64_t row = place.row + Sums::row(i);
    if (row >= target.m) continue;
#pragma unroll
    for (int j = 0; j < Tile::kN; j += Sums::kGroup) {
      const int64_t column = place.column + Sums::column(j);
      if (in_place) {
        store_weights(target, c.sizes, row, column, sums.group(i, j));
      } else {
        target.store(row, column, sums.group(i, j));
      }
    }
  }
  if constexpr (to == MapTo::kOutput && !is_reduced<value_t>) {
    // From registers: saves a pass over z.
    if (c.moments) store_moments(c, place, sums);
  }
}

// Host side: chooses the tile, and how the sums are split.
template <typename value_t>
class ConvolutionLauncher {
 public:
  ConvolutionLauncher(const Convolution<value_t>& c, int64_t tasks, int64_t multiprocessors,
                      acc_t<value_t>* parts, bool tf32, cudaStream_t stream)
      : c_(c),
        p_(product()),
        tasks_(tasks),
        multiprocessors_(multiprocessors),
        parts_(parts),
        tf32_(tf32),
        stream_(stream) {}

  LaunchedConvolution<value_t> run() const {
    switch (c_.to) {
      case MapTo::kOutput:
        return to_image<MapTo::kOutput>();
      case MapTo::kInput:
        return to_image<MapTo::kInput>();
      case MapTo::kWeight:
        return to_weight();
    }
    return {};
  }

 private:
  Product<value_t> product() const {
    const ConvShape& s = c_.shape;
    Product<value_t> p{Form::kNN, 0, 0, 0, c_.c, c_.into, c_.bias};
    if (c_.to == MapTo::kWeight) {
      p.m = s.outputs, p.n = s.taps() * s.channels, p.k = c_.examples * s.out_positions();
    } else {
      const bool to_output = c_.to == MapTo::kOutput;
      p.m = c_.examples * (to_output ? s.out_positions() : s.in_positions());
      p.n = to_output ? s.outputs : s.channels;
      p.k = s.taps() * (to_output ? s.channels : s.outputs);
    }
    for (int pair = 0; pair < c_.pairs; ++pair) p.add(c_.a[pair], c_.b[pair]);
    return p;
  }

  template <MapTo to>
  LaunchedConvolution<value_t> to_image() const {
    if constexpr (!std::is_same_v<value_t, double>) {
      // Larger tiles read less for each product, but only pay if every multiprocessor gets one.
      if (p_.n > NarrowImageTile::kColumns && fills<LargeImageTile>()) {
        return in<to, LargeImageTile>();
      }
      if (p_.n <= NarrowImageTile::kColumns && fills<NarrowImageTile>()) {
        return in<to, NarrowImageTile>();
      }
    }
    return in<to, SmallImageTile>();
  }

  LaunchedConvolution<value_t> to_weight() const {
    if (p_.n <= NarrowWeightTile::kColumns) return in<MapTo::kWeight, NarrowWeightTile>();
    if constexpr (!std::is_same_v<value_t, double>) {
      if (p_.n > SmallWeightTile::kColumns) {
        const bool is_short = p_.m <= ShortWeightTile::kRows;
        return is_short ? in<MapTo::kWeight, ShortWeightTile>()
                        : in<MapTo::kWeight, LargeWeightTile>();
      }
    }
    return in<MapTo::kWeight, SmallWeightTile>();
  }

  // Whether this tile gives each multiprocessor a block.
  template <typename Tile>
  bool fills() const {
    return ceil_div(p_.m, Tile::kRows) * ceil_div(p_.n, Tile::kColumns) * tasks_ >=
           multiprocessors_;
  }

  template <MapTo to, typename Tile>
  LaunchedConvolution<value_t> in() const {
    using Deep = DeepTile<Tile, value_t>;
    if constexpr (is_reduced<value_t>) {
      return by<to, TensorSums<value_t, Deep>, Deep>();
    } else {
      if constexpr (std::is_same_v<value_t, float>) {
        if (tf32_) return by<to, TensorSums<value_t, Deep>, Deep>();
      }
      return by<to, ThreadSums<value_t, Tile>, Tile>();
    }
  }

  template <MapTo to, typename Sums, typename Tile>
  LaunchedConvolution<value_t> by() const {
    static_assert(Tile::kBlocks * Tile::kRows * Tile::kColumns <= kMostConvolutionParts);
    static_assert(Tile::kColumns <= Tile::kThreads);
    GridConvolution<value_t> c{in_tiles<Tile>(p_), ConvSizes(c_.shape), is_wide(), {}};
    const int64_t tiles = tasks_ * c.g.row_tiles * c.g.column_tiles;
    split_sums(c.g, tiles, multiprocessors_ * Tile::kBlocks, parts_);
    const int64_t numbers = c.g.row_tiles * 2 * p_.n;
    // Moments share the memory of parts, so a launch has one or the other.
    const bool fit = tasks_ * numbers <= multiprocessors_ * kMostConvolutionParts;
    if (c_.moments && c.g.splits == 1 && !p_.into.adds && fit) c.moments = {parts_, numbers};
    const auto error = launch(convolution_kernel<to, Sums, Tile, value_t>, tiles * c.g.splits,
                              Tile::kThreads, 0, stream_, c);
    return {c.g, c.moments, Tile::kRows, error};
  }

  // Whether the images behind the patches allow wide reads.
  bool is_wide() const {
    const bool of_dz = c_.to == MapTo::kInput;
    bool wide = (of_dz ? c_.shape.outputs : c_.shape.channels) % kPatchPack == 0;
    for (int pair = 0; pair < c_.pairs; ++pair) {
      const auto& images = c_.to == MapTo::kWeight ? c_.b[pair] : c_.a[pair];
      // Every task's images must be aligned, not only the first one's.
      wide = wide && reinterpret_cast<uintptr_t>(images.data) % kAccessBytes == 0 &&
             images.task_stride % kPatchPack == 0;
    }
    return wide;
  }

  const Convolution<value_t>& c_;
  Product<value_t> p_;
  int64_t tasks_, multiprocessors_;
  acc_t<value_t>* parts_;
  bool tf32_;
  cudaStream_t stream_;
};

template <typename value_t>
LaunchedConvolution<value_t> launch_convolution(const Convolution<value_t>& c, int64_t tasks,
                                                int64_t multiprocessors, acc_t<value_t>* parts,
                                                bool tf32, cudaStream_t stream) {
  return ConvolutionLauncher<value_t>(c, tasks, multiprocessors, parts, tf32, stream).run();
}

}  // namespace fastmeta
