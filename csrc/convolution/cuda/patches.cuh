// Operands of a convolution as a matrix product, C = A B, on their way from global to shared
// memory:
//
//   to z    A [positions of z, taps x C] patches of x,         B [taps x C, O] weights
//   to dx   A [positions of x, taps x O] patches of dz,        B [taps x O, C] weights
//   to dw   A [O, positions of z] of dz,                       B [positions, taps x C] patches of x
//
// Patches are made as they are read. A thread carries its tap and channel, or its position, from
// one slice to the next, so that it divides only at the start.
#pragma once

#include "execution/conv_shape.h"
#include "execution/cuda/grid_product.cuh"

namespace fastmeta {

// Sizes of a ConvShape as 32-bit numbers, with which a thread computes quickly.
struct ConvSizes {
  int channels, outputs, height, width, out_height, out_width;
  int kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;

  explicit ConvSizes(const ConvShape& s)
      : channels(int(s.channels)),
        outputs(int(s.outputs)),
        height(int(s.height)),
        width(int(s.width)),
        out_height(int(s.out_height())),
        out_width(int(s.out_width())),
        kernel_h(int(s.kernel_h)),
        kernel_w(int(s.kernel_w)),
        stride_h(int(s.stride_h)),
        stride_w(int(s.stride_w)),
        padding_h(int(s.padding_h)),
        padding_w(int(s.padding_w)),
        dilation_h(int(s.dilation_h)),
        dilation_w(int(s.dilation_w)) {}

  FASTMETA_HOST_DEVICE int taps() const { return kernel_h * kernel_w; }
};

inline constexpr int kPatchPack = 4;         // channels that are read at once
inline constexpr int kNowhere = -(1 << 30);  // offset of a position in no image

// Coordinate of a tap in images of size [height, width], along one dimension: in x for a position
// of z, or in dz for a position of x. Negative if outside.
__device__ inline int tap_in_x(int place, int tap, int dilation, int size) {
  const int at = place + tap * dilation;
  return at >= 0 && at < size ? at : -1;
}
__device__ inline int tap_in_dz(int place, int tap, int dilation, int stride, int size) {
  const int at = place - tap * dilation;
  if (at < 0) return -1;
  // Avoids two divisions in the common case.
  if (stride == 1) return at < size ? at : -1;
  // Only every stride-th place was an output.
  return at % stride == 0 && at / stride < size ? at / stride : -1;
}

// Rows of A to z and to dx. A thread has one position, and of each slice kCount neighbours in k,
// which runs over taps and then channels.
template <typename value_t, MapTo to, typename Tile>
class PatchRows {
  static constexpr int kCount = Tile::kRows * Tile::kDepth / Tile::kThreads;
  static_assert(Tile::kThreads % Tile::kRows == 0 && kCount % kPatchPack == 0);

 public:
  __device__ PatchRows(const ConvSizes& s, bool wide, int64_t row, int64_t rows)
      : s_(s), wide_(wide) {
    row += threadIdx.x % Tile::kRows;
    const int row_width = to == MapTo::kOutput ? s.out_width : s.width;
    const int row_height = to == MapTo::kOutput ? s.out_height : s.height;
    const int64_t line = row / row_width;
    const int h = int(line % row_height), w = int(row % row_width);
    // Rows past the end take the address of image 0 and kNowhere: every tap is outside.
    const bool is_there = row < rows;
    image_ = is_there ? line / row_height * height() * width() * channels() : 0;
    if constexpr (to == MapTo::kOutput) {
      h_ = is_there ? h * s.stride_h - s.padding_h : kNowhere;
      w_ = w * s.stride_w - s.padding_w;
    } else {
      h_ = is_there ? h + s.padding_h : kNowhere;
      w_ = w + s.padding_w;
    }
  }

  // Starts the loads of the slice from k on.
  __device__ void fetch(const value_t* data, int64_t k) {
    // Divides only at the start of a split or pair.
    if (k != next_) seek(int(k) + int(threadIdx.x) / Tile::kRows * kCount);
    next_ = k + Tile::kDepth;
    const value_t* image = data + image_;
    if (wide_) {
#pragma unroll
      for (int i = 0; i < kCount; i += kPatchPack) {
        Pack<value_t, kPatchPack> pack{};
        // `wide` guarantees that a pack lies within one tap.
        if (offset_ >= 0) pack = *as_packs<kPatchPack>(image + offset_ + channel_);
#pragma unroll
        for (int j = 0; j < kPatchPack; ++j) raw_[i + j] = pack[j];
        skip(kPatchPack);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        raw_[i] = offset_ >= 0 ? image[offset_ + channel_] : value_t{};
        skip(1);
      }
    }
    // The other threads of this row read the rest of the slice.
    skip(Tile::kDepth - kCount);
  }

  __device__ void store(value_t* slice, int width) const {
    constexpr int kTwo = kInWord<value_t>;
    const int thread = threadIdx.x;
    const int k = thread / Tile::kRows * kCount, row = thread % Tile::kRows;
    auto* words = as_packs<kTwo>(slice + in_slice<value_t>(k, row, width));
#pragma unroll
    for (int i = 0; i < kCount; i += kTwo) {
      Pack<value_t, kTwo> word;
#pragma unroll
      for (int j = 0; j < kTwo; ++j) word[j] = raw_[i + j];
      words[i / kTwo * width] = word;
    }
  }

 private:
  // Channels of the images behind the patches.
  __device__ int channels() const { return to == MapTo::kOutput ? s_.channels : s_.outputs; }
  __device__ int height() const { return to == MapTo::kOutput ? s_.height : s_.out_height; }
  __device__ int width() const { return to == MapTo::kOutput ? s_.width : s_.out_width; }

  __device__ void seek(int k) {
    const int tap = k / channels();
    channel_ = k % channels();
    tap_h_ = tap / s_.kernel_w;
    tap_w_ = tap % s_.kernel_w;
    find_tap();
  }

  __device__ void skip(int numbers) {
    channel_ += numbers;
    while (channel_ >= channels()) {
      channel_ -= channels();
      if (++tap_w_ == s_.kernel_w) {
        tap_w_ = 0;
        ++tap_h_;
      }
      find_tap();
    }
  }

  // Finds the tap's channels in the image; negative if outside.
  __device__ void find_tap() {
    int h, w;
    if constexpr (to == MapTo::kOutput) {
      h = tap_in_x(h_, tap_h_, s_.dilation_h, s_.height);
      w = tap_in_x(w_, tap_w_, s_.dilation_w, s_.width);
    } else {
      h = tap_in_dz(h_, tap_h_, s_.dilation_h, s_.stride_h, s_.out_height);
      w = tap_in_dz(w_, tap_w_, s_.dilation_w, s_.stride_w, s_.out_width);
    }
    // Past the last tap a slice is filled with zeros.
    const bool is_there = tap_h_ < s_.kernel_h && h >= 0 && w >= 0;
    offset_ = is_there ? (h * width() + w) * channels() : -1;
  }

  const ConvSizes& s_;
  bool wide_;
  int64_t image_, next_ = -1;
  int h_, w_, tap_h_, tap_w_, channel_, offset_;
  value_t raw_[kCount];
};

// Columns of B to z and to dx: weights, in memory [O, C, taps]. A thread has one k of each slice,
// and every kStep-th column.
template <typename value_t, MapTo to, typename Tile>
class WeightColumns {
  static constexpr int kStep = Tile::kThreads / Tile::kDepth, kCount = Tile::kColumns / kStep;
  static_assert(Tile::kThreads % Tile::kDepth == 0 && Tile::kColumns % kStep == 0);

 public:
  __device__ WeightColumns(const ConvSizes& s, int64_t column)
      : s_(s), column_(int(column) + int(threadIdx.x) / Tile::kDepth) {}

  __device__ void fetch(const value_t* data, int64_t k) {
    if (k != next_) seek(int(k) + int(threadIdx.x) % Tile::kDepth);
    next_ = k + Tile::kDepth;
    const int64_t channel_stride =
        to == MapTo::kOutput ? s_.taps() : int64_t(s_.channels) * s_.taps();
    const int64_t column_stride =
        to == MapTo::kOutput ? int64_t(s_.channels) * s_.taps() : s_.taps();
    const int columns = to == MapTo::kOutput ? s_.outputs : s_.channels;
    const value_t* source = data + channel_ * channel_stride + tap_ + column_ * column_stride;
#pragma unroll
    for (int i = 0; i < kCount; ++i, source += kStep * column_stride) {
      // Zeros past the ends add nothing to the sums.
      const bool is_there = tap_ < s_.taps() && column_ + i * kStep < columns;
      raw_[i] = is_there ? *source : value_t{};
    }
    channel_ += Tile::kDepth;
    while (channel_ >= channels()) {
      channel_ -= channels();
      ++tap_;
    }
  }

  __device__ void store(value_t* slice, int width) const {
    const int thread = threadIdx.x;
    const int k = thread % Tile::kDepth, column = thread / Tile::kDepth;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      slice[in_slice<value_t>(k, column + i * kStep, width)] = raw_[i];
    }
  }

 private:
  __device__ int channels() const { return to == MapTo::kOutput ? s_.channels : s_.outputs; }

  __device__ void seek(int k) {
    tap_ = k / channels();
    channel_ = k % channels();
  }

  const ConvSizes& s_;
  int column_, tap_, channel_;
  int64_t next_ = -1;
  value_t raw_[kCount];
};

// Columns of B to dw. A thread has kPatchPack neighbours of taps x channels, and every kLanes-th
// word of positions of z.
template <typename value_t, typename Tile>
class PatchColumns {
  static constexpr int kPacks = Tile::kColumns / kPatchPack, kLanes = Tile::kThreads / kPacks;
  static constexpr int kCount = Tile::kDepth / kLanes;
  static constexpr int kTwo = kInWord<value_t>;
  static_assert(Tile::kThreads % kPacks == 0 && kCount * kLanes == Tile::kDepth);
  static_assert(kCount % kTwo == 0);
  using Numbers = Pack<value_t, kPatchPack>;

 public:
  __device__ PatchColumns(const ConvSizes& s, bool wide, int64_t column, int64_t positions)
      : s_(s), wide_(wide), positions_(positions) {
    const int first = int(column) + int(threadIdx.x) % kPacks * kPatchPack;
#pragma unroll
    for (int j = 0; j < kPatchPack; ++j) {
      const int tap = (first + j) / s.channels;
      channel_[j] = (first + j) % s.channels;
      // The tap's shift is fixed for a column; positions move along k.
      h_[j] = tap < s.taps() ? tap / s.kernel_w * s.dilation_h - s.padding_h : kNowhere;
      w_[j] = tap % s.kernel_w * s.dilation_w - s.padding_w;
    }
  }

  // Starts the loads of the slice from position k on.
  __device__ void fetch(const value_t* data, int64_t k) {
    if (k != next_) seek(k + threadIdx.x / kPacks * kTwo);
    next_ = k + Tile::kDepth;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      raw_[i] = read(data);
      // Half types read two neighbours for one word, then jump over the other lanes' words.
      const int step = i % kTwo == kTwo - 1 ? kTwo * (kLanes - 1) + 1 : 1;
      out_w_ += step;
      while (out_w_ >= s_.out_width) {
        out_w_ -= s_.out_width;
        // Carries like a counter: column, line, image.
        if (++out_h_ < s_.out_height) continue;
        out_h_ = 0;
        image_ += int64_t(s_.height) * s_.width * s_.channels;
      }
      position_ += step;
    }
  }

  __device__ void store(value_t* slice, int width) const {
    const int thread = threadIdx.x;
    const int k = thread / kPacks * kTwo, column = thread % kPacks * kPatchPack;
    auto* words = as_packs<kPatchPack * kTwo>(slice + in_slice<value_t>(k, column, width));
#pragma unroll
    for (int i = 0; i < kCount; i += kTwo) {
      Pack<value_t, kPatchPack * kTwo> pack;
#pragma unroll
      for (int j = 0; j < kPatchPack * kTwo; ++j) pack[j] = raw_[i + j % kTwo][j / kTwo];
      words[i * kLanes * width / (kPatchPack * kTwo)] = pack;
    }
  }

 private:
  __device__ void seek(int64_t position) {
    const int64_t line = position / s_.out_width;
    position_ = position;
    out_w_ = int(position % s_.out_width);
    out_h_ = int(line % s_.out_height);
    image_ = line / s_.out_height * s_.height * s_.width * s_.channels;
  }

  __device__ int offset(int j) const {
    const int h = tap_in_x(h_[j], out_h_, s_.stride_h, s_.height);
    const int w = tap_in_x(w_[j], out_w_, s_.stride_w, s_.width);
    return h >= 0 && w >= 0 ? (h * s_.width + w) * s_.channels + channel_[j] : -1;
  }

  __device__ Numbers read(const value_t* data) const {
    Numbers numbers{};
    if (position_ >= positions_) return numbers;
    const value_t* image = data + image_;
    if (wide_) {
      // A wide pack has one tap, so its first channel tells where all are.
      const int place = offset(0);
      if (place >= 0) numbers = *as_packs<kPatchPack>(image + place);
      return numbers;
    }
#pragma unroll
    for (int j = 0; j < kPatchPack; ++j) {
      const int place = offset(j);
      if (place >= 0) numbers[j] = image[place];
    }
    return numbers;
  }

  const ConvSizes& s_;
  bool wide_;
  int64_t positions_, position_, image_, next_ = -1;
  int out_h_, out_w_, h_[kPatchPack], w_[kPatchPack], channel_[kPatchPack];
  Numbers raw_[kCount];
};

}  // namespace fastmeta
