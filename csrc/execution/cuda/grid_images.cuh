// Steps over channels-last images of all tasks: of each element, and sums over positions of each
// channel.
// Neighbouring lanes have neighbouring channels, up to 32 of them, in a block of kImageThreads; its
// rows have one position each. A block walks a run of positions of one set, the whole batch or an
// image; then its rows' numbers merge pair by pair. If sets are too few for the device, several
// blocks share one, and the next launch merges their numbers in order.
#pragma once

#include <algorithm>
#include <limits>

#include "common/ceil_div.h"
#include "common/cuda/launch.cuh"
#include "execution/cuda/grid_accessors.cuh"
#include "execution/elementwise.h"

namespace fastmeta {

inline constexpr int kImageThreads = 256;
inline constexpr int64_t kImageBlocks = 8;  // blocks of a multiprocessor at once
inline constexpr int64_t kMostImageParts = kImageBlocks * 2 * kWarp;  // numbers of a multiprocessor

// Assignment of positions to blocks; int, whose division takes no call.
struct ImageGrid {
  Images images;
  int height, width, sets, set_positions, splits, split_positions, column_blocks;
  int columns_log2;  // channels of a block

  FASTMETA_HOST_DEVICE int columns() const { return 1 << columns_log2; }
  FASTMETA_HOST_DEVICE int rows() const { return kImageThreads >> columns_log2; }

  ImageGrid(const Images& i, bool whole_batch)
      : images(i),
        height(static_cast<int>(i.height)),
        width(static_cast<int>(i.width)),
        sets(whole_batch ? 1 : static_cast<int>(i.count)),
        set_positions(static_cast<int>(whole_batch ? i.positions() : i.height * i.width)),
        splits(1),
        split_positions(set_positions),
        columns_log2(0) {
    // A power of two: rows and columns are shifts of the thread's number.
    while (columns() < kWarp && columns() < i.channels) ++columns_log2;
    column_blocks = static_cast<int>(ceil_div(i.channels, columns()));
  }

  // Whether int can count the images of a task.
  static bool has(const Images& i) {
    return i.positions() <= std::numeric_limits<int>::max() - kImageThreads;
  }

  // Splits sets by `positions` or more each, rounded up so that a block's rows have equally many.
  void split_into(int64_t positions) {
    const int64_t all = ceil_div(std::max<int64_t>(1, positions), rows()) * rows();
    split_positions = static_cast<int>(all);
    splits = static_cast<int>(std::max<int64_t>(1, ceil_div(set_positions, all)));
  }
  int64_t blocks(int64_t tasks) const { return tasks * sets * splits * column_blocks; }
};

// Place of a thread: its channel, and the positions from its first one on, every rows()-th.
template <typename value_t>
struct ImagePlace {
  GlobalImageAccessor<value_t> at;
  int set, split, left;  // left: positions, negative or 0 if none

  __device__ explicit ImagePlace(const ImageGrid& g) {
    const int row = threadIdx.x / g.columns(), column = threadIdx.x % g.columns();
    int block = static_cast<int>(blockIdx.x);
    at.channel = block % g.column_blocks * g.columns() + column;
    block /= g.column_blocks;
    split = block % g.splits;
    block /= g.splits;
    set = block % g.sets;
    at.task = block / g.sets;
    const int rest = g.set_positions - split * g.split_positions;
    left = (rest < g.split_positions ? rest : g.split_positions) - row;
    // Threads past the last channel take part in the merge with nothing.
    if (at.channel >= g.images.channels) left = 0;
    const int position = set * g.set_positions + split * g.split_positions + row;
    const int line = position / g.width;
    at.w = position % g.width;
    at.h = line % g.height;
    at.image = line / g.height;
  }

  __device__ void advance(const ImageGrid& g) {
    left -= g.rows();
    at.w += g.rows();
    while (at.w >= g.width) {
      at.w -= g.width;
      // Carries like a counter: column, line, image.
      if (++at.h < g.height) continue;
      at.h = 0;
      ++at.image;
    }
  }
};

template <typename value_t, typename F>
__global__ void __launch_bounds__(kImageThreads, 3) table_kernel(ImageGrid g, F f) {
  for (ImagePlace<value_t> place(g); place.left > 0; place.advance(g)) f(place.at);
}

// Two sums of a channel.
template <typename value_t>
struct ChannelSums {
  value_t first, second;

  __device__ void merge(const ChannelSums& other) {
    first += other.first;
    second += other.second;
  }
  // Reads back a part; its count of positions is not needed.
  static __device__ ChannelSums of(int64_t, value_t first, value_t second) {
    return {first, second};
  }

  template <typename F>
  static __device__ ChannelSums over(ImagePlace<value_t>& place, const ImageGrid& g, const F& f) {
    ChannelSums sums{};
    for (; place.left > 0; place.advance(g)) {
      const Two<value_t> two = f(place.at);
      sums.merge({two.first, two.second});
    }
    return sums;
  }
};

// Mean, and sum of squares of distances from it. Sets merge by Chan, Golub and LeVeque (1979).
template <typename value_t>
struct ChannelMoments {
  value_t first, second, count;

  __device__ void merge(const ChannelMoments& other) {
    // Both counts may be 0, and 0 / 0 is NaN.
    if (other.count == 0) return;
    const value_t all = count + other.count, share = other.count / all;
    const value_t distance = other.first - first;
    first += distance * share;
    second += other.second + distance * distance * count * share;
    count = all;
  }
  static __device__ ChannelMoments of(int64_t count, value_t first, value_t second) {
    return {first, second, static_cast<value_t>(count)};
  }

  // Adds numbers in runs of kRun, so that each run takes one division.
  template <typename F>
  static __device__ ChannelMoments over(ImagePlace<value_t>& place, const ImageGrid& g,
                                        const F& x) {
    constexpr int kRun = 8;
    ChannelMoments moments{};
    while (place.left > 0) {
      value_t numbers[kRun];
      int count = 0;
      ChannelMoments run{};
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        numbers[i] = place.left > 0 ? x(place.at) : value_t(0);
        if (place.left > 0) ++count;
        run.first += numbers[i];
        place.advance(g);
      }
      run.count = static_cast<value_t>(count);
      // The count is at least 1: `left` was positive.
      run.first /= run.count;
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        const value_t distance = i < count ? numbers[i] - run.first : value_t(0);
        run.second += distance * distance;
      }
      moments.merge(run);
    }
    return moments;
  }
};

// Loads an element of an array.
template <typename value_t>
struct NumbersOf {
  Images images;
  Array<value_t> x;

  __device__ value_t operator()(const GlobalImageAccessor<value_t>& at) const {
    return at.load(x, images.place(at.image, at.h, at.w));
  }
};

// Computes target[set, 0 or 1, channel], sets `stride` numbers apart; or parts, [set, split, 0 or
// 1, channel].
template <typename value_t, typename Sums, typename F>
__global__ void __launch_bounds__(kImageThreads, 3)
    column_kernel(ImageGrid g, F f, Array<value_t> target, int64_t stride) {
  __shared__ Sums rows[kImageThreads];
  ImagePlace<value_t> place(g);
  Sums sums = Sums::over(place, g, f);
  const int thread = threadIdx.x;
  for (int others = kImageThreads / 2; others >= g.columns(); others /= 2) {
    // Halves the rows each round; all columns of a row move together.
    if (thread >= others && thread < 2 * others) rows[thread] = sums;
    __syncthreads();
    if (thread < others) sums.merge(rows[thread + others]);
  }
  if (thread >= g.columns() || place.at.channel >= g.images.channels) return;
  const int64_t begin = (int64_t(place.set) * g.splits + place.split) * stride;
  place.at.store(target, begin, sums.first);
  place.at.store(target, begin + g.images.channels, sums.second);
}

// Merges the parts of a set's channel into its target; an accessor is a channel of a set.
template <typename value_t, typename Sums>
struct SumOfImageParts {
  ImageGrid g;
  Array<value_t> parts, target;

  __device__ void operator()(const GlobalAccessor<value_t>& element) const {
    const int64_t channels = g.images.channels, set = element.index / channels;
    GlobalImageAccessor<value_t> at{};
    at.task = element.task;
    at.channel = element.index % channels;
    Sums sums{};
    for (int64_t s = 0; s < g.splits; ++s) {
      const int64_t begin = (set * g.splits + s) * 2 * channels;
      const int64_t rest = g.set_positions - s * int64_t(g.split_positions);
      sums.merge(Sums::of(rest < g.split_positions ? rest : g.split_positions,
                          at.load(parts, begin), at.load(parts, begin + channels)));
    }
    at.store(target, set * 4 * channels, sums.first);
    at.store(target, set * 4 * channels + channels, sums.second);
  }
};

}  // namespace fastmeta
