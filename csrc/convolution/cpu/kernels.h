// The three maps on ranges of rows (output positions of all examples, in order), for weights packed
// as PackedWeights says: dense convolution by matrix products, depthwise by direct sums.
#pragma once

#include <span>

#include "common/cpu/register_gemm.h"
#include "convolution/cpu/patches.h"

namespace fastmeta {

// Factors of a product: (x, w) for outputs, (dz, w) for inputs, (dz, x) for weights.
template <typename value_t>
struct ConvPair {
  const value_t *a, *b;
};
template <typename value_t>
using ConvPairs = std::span<const ConvPair<value_t>>;

template <typename value_t>
void add_to(const value_t* source, int64_t count, value_t* target) {
  using Vec = at::vec::Vectorized<value_t>;
  at::vec::map2<value_t>([](Vec a, Vec b) { return a + b; }, target, target, source, count);
}

// Weights with the channels of a tap next to each other: dense [O, taps, C]; depthwise [taps, O /
// C, C], PyTorch's [C, O / C, taps] reordered. Both are transposed matrices [C, taps].
class PackedWeights {
 public:
  // Weights [C taps, O], the factor of patches of planes.
  static PackedWeights of_planes(const ConvShape& s) {
    PackedWeights turned(s);
    turned.channels_ = turned.packed_stride_ = s.outputs;
    turned.taps_ = turned.stride_ = s.channels * s.taps();
    turned.matrices_ = 1;
    return turned;
  }

  explicit PackedWeights(const ConvShape& s)
      : channels_(s.channels),
        taps_(s.taps()),
        matrices_(s.is_depthwise() ? s.outputs / s.channels : s.outputs),
        step_(s.is_depthwise() ? taps_ : channels_ * taps_),
        stride_(s.is_depthwise() ? matrices_ * taps_ : taps_),
        packed_step_(s.is_depthwise() ? channels_ : channels_ * taps_),
        packed_stride_(s.is_depthwise() ? s.outputs : channels_) {}

  // One channel or one tap: both orders are the same, nothing to pack.
  bool is_identity() const { return channels_ == 1 || (taps_ == 1 && packed_step_ == step_); }

  template <typename value_t>
  void pack(const value_t* w, value_t* packed) const {
    for (int64_t m = 0; m < matrices_; ++m) {
      transpose(channels_, taps_, w + m * step_, stride_, packed + m * packed_step_,
                packed_stride_);
    }
  }
  template <typename value_t>
  void unpack(const value_t* packed, value_t* w) const {
    for (int64_t m = 0; m < matrices_; ++m) {
      transpose(taps_, channels_, packed + m * packed_step_, packed_stride_, w + m * step_,
                stride_);
    }
  }

 private:
  int64_t channels_, taps_, matrices_, step_, stride_, packed_step_, packed_stride_;
};

template <typename value_t>
class CpuDense {
 public:
  explicit CpuDense(const ConvShape& shape)
      : patches_(shape), channels_(shape.channels), outputs_(shape.outputs) {}

  bool is_planar() const { return patches_.is_planar(); }
  int64_t block() const { return patches_.block(); }
  int64_t scratch() const { return patches_.scratch(); }

  // Computes outputs; packed: [columns, O] for planes, else [O, columns].
  void output(const Interval& rows, const value_t* x, const value_t* packed, value_t* z, bool adds,
              value_t* scratch) const {
    const auto patches = patches_.gather(x, rows, scratch);
    value_t* target = z + rows.begin * outputs_;
    if (patches_.is_planar()) {
      multiply(rows.size(), outputs_, columns(), patches, packed, target, adds);
    } else {
      gemm(rows.size(), outputs_, columns(), patches, {packed, columns(), true}, target, outputs_,
           adds);
    }
  }

  void add_input(const Interval& rows, const value_t* dz, const value_t* packed, value_t* dx,
                 value_t* scratch) const {
    // For one tap and stride 1 the product is the gradient: no scatter.
    value_t* target = patches_.is_image() ? dx + rows.begin * channels_ : scratch;
    multiply<value_t>(rows.size(), columns(), outputs_, {dz + rows.begin * outputs_, outputs_},
                      packed, target, patches_.is_image());
    if (!patches_.is_image()) patches_.scatter_add(scratch, rows, dx);
  }

  void weight(const Interval& rows, const value_t* dz, const value_t* x, value_t* sum, bool adds,
              value_t* scratch) const {
    const value_t* dz_rows = dz + rows.begin * outputs_;
    auto patches = patches_.gather(x, rows, scratch);
    if (patches_.is_planar()) {
      // gather() gave the transposed matrix, which is what this product needs.
      patches.transposed = false;
      multiply(columns(), outputs_, rows.size(), patches, dz_rows, sum, adds);
    } else {
      multiply(outputs_, columns(), rows.size(), {dz_rows, outputs_, true}, patches.data, sum,
               adds);
    }
  }

 private:
  int64_t columns() const { return patches_.columns(); }

  CpuPatches<value_t> patches_;
  int64_t channels_, outputs_;
};

// Depthwise convolution: vectors run over the channels, for each of the O / C outputs of a channel.
template <typename value_t>
class CpuDepthwise {
 public:
  explicit CpuDepthwise(const ConvShape& shape)
      : axes_(shape),
        channels_(shape.channels),
        outputs_(shape.outputs),
        multiples_(shape.outputs / shape.channels) {}

  bool is_planar() const { return false; }
  int64_t block() const { return kRows; }
  int64_t scratch() const { return 2 * outputs_; }

  void output(const Interval& rows, const value_t* x, const value_t* packed, value_t* z, bool adds,
              value_t* scratch) const {
    value_t *sum = scratch, *turned = scratch + outputs_;
    axes_.for_each_position(rows, [&](int64_t row, int64_t example, int64_t i, int64_t j) {
      // Sums are [O / C, C], to vectorise over C; rows of z are [C, O / C].
      std::fill_n(sum, outputs_, value_t(0));
      for_each_tap(example, i, j, [&](int64_t tap, int64_t m, int64_t pixel) {
        add_product(x + pixel, packed + tap + m, sum + m);
      });
      transpose(multiples_, channels_, sum, channels_, turned, multiples_);
      value_t* target = z + row * outputs_;
      if (adds) {
        add_to(turned, outputs_, target);
      } else {
        std::copy_n(turned, outputs_, target);
      }
    });
  }

  void add_input(const Interval& rows, const value_t* dz, const value_t* packed, value_t* dx,
                 value_t* scratch) const {
    axes_.for_each_position(rows, [&](int64_t row, int64_t example, int64_t i, int64_t j) {
      const value_t* turned = turned_row(dz, row, scratch);
      for_each_tap(example, i, j, [&](int64_t tap, int64_t m, int64_t pixel) {
        add_product(turned + m, packed + tap + m, dx + pixel);
      });
    });
  }

  void weight(const Interval& rows, const value_t* dz, const value_t* x, value_t* sum, bool adds,
              value_t* scratch) const {
    if (!adds) {
      std::fill_n(sum, axes_.vertical.taps * axes_.horizontal.taps * outputs_, value_t(0));
    }
    axes_.for_each_position(rows, [&](int64_t row, int64_t example, int64_t i, int64_t j) {
      const value_t* turned = turned_row(dz, row, scratch);
      for_each_tap(example, i, j, [&](int64_t tap, int64_t m, int64_t pixel) {
        add_product(turned + m, x + pixel, sum + tap + m);
      });
    });
  }

 private:
  static constexpr int64_t kRows = 256;

  // Reorders outputs [C, O / C] to [O / C, C].
  const value_t* turned_row(const value_t* dz, int64_t row, value_t* scratch) const {
    const value_t* source = dz + row * outputs_;
    if (multiples_ == 1) return source;
    transpose(channels_, multiples_, source, multiples_, scratch, channels_);
    return scratch;
  }

  // Calls body(offset of the tap's weights, of an output's channels, of the pixel's channels).
  template <typename Body>
  void for_each_tap(int64_t example, int64_t i, int64_t j, const Body& body) const {
    const ImageAxis &vertical = axes_.vertical, &horizontal = axes_.horizontal;
    const Interval lines = vertical.taps_inside(i), columns = horizontal.taps_inside(j);
    for (int64_t a = lines.begin; a < lines.end; ++a) {
      const int64_t line = example * vertical.size + vertical.pixel(i, a);
      for (int64_t b = columns.begin; b < columns.end; ++b) {
        const int64_t pixel = line * horizontal.size + horizontal.pixel(j, b);
        for (int64_t m = 0; m < outputs_; m += channels_) {
          body((a * horizontal.taps + b) * outputs_, m, pixel * channels_);
        }
      }
    }
  }

  void add_product(const value_t* a, const value_t* b, value_t* target) const {
    using Vec = at::vec::Vectorized<value_t>;
    at::vec::map3<value_t>([](Vec c, Vec a, Vec b) { return at::vec::fmadd(a, b, c); }, target,
                           target, a, b, channels_);
  }

  ImageAxes axes_;
  int64_t channels_, outputs_, multiples_;
};

}  // namespace fastmeta
