// The three maps of a convolution of 3 x 3 taps and stride 1, on the CPU, by Winograd's minimal
// filtering (Lavin, Gray 2016, arXiv 1509.09308): a tile of 2 x 2 outputs of a channel takes 16
// multiplications instead of 36. With tiles x 4 x 4 of the inputs, z and dz 2 x 2, and g 3 x 3,
//
//   U = G g G',  V = B' x B,  z  = A' [sum over channels of U V] A
//   D = A dz A',              dg = G' [sum over tiles of D V] G
//
// and dx is the z of dz and rotated weights. The factors are 0, 1 and 1/2: float32 loses no more
// digits than in plain sums of products. A number that is not finite reaches all outputs of its
// tile.
//
// Tiles are computed a block of lines at a time, cut at the same places for any number of threads.
#pragma once

#include "common/cpu/blas_threads.h"
#include "common/cpu/parallel.h"
#include "convolution/cpu/kernels.h"
#include "convolution/cpu/winograd_tiles.h"

namespace fastmeta {

template <typename value_t>
class CpuWinograd {
  using W = Winograd<value_t>;
  using Tiles = WinogradTiles<value_t>;
  using Vec = typename W::Vec;
  static constexpr int64_t kPlaces = W::kPlaces, kWidth = W::kWidth;

 public:
  static bool takes(const ConvShape& s) {
    return s.kernel_h == 3 && s.kernel_w == 3 && s.stride_h == 1 && s.stride_w == 1 &&
           s.dilation_h == 1 && s.dilation_w == 1 && s.groups == 1 && s.channels % kWidth == 0 &&
           s.outputs % kWidth == 0;
  }

  CpuWinograd(const ConvShape& shape, int64_t examples, int64_t threads)
      : shape_(shape),
        x_{{shape.height, shape.width, shape.channels}},
        z_{{shape.out_height(), shape.out_width(), shape.outputs}},
        examples_(examples),
        threads_(threads) {}

  // Whether minimal filtering pays. Compares, for each pair of channels, the multiplications and
  // other work of both methods; the other sums nine products.
  bool pays() const {
    const int64_t tiles = examples_ * z_.lines() * z_.columns();
    return kPlaces * tiles * 6 / 5 + kWeightCost < 9 * examples_ * shape_.out_positions();
  }

  // Workspace elements, for each thread that shares a call.
  static int64_t scratch(const ConvShape& shape) {
    const CpuWinograd one(shape, 1, 1);
    const int64_t lines = std::max(one.block_lines(one.x_), one.block_lines(one.z_));
    const int64_t tiles = lines * std::max(one.x_.columns(), one.z_.columns());
    const int64_t of_block =
        kPlaces * (place_stride(tiles, shape.channels) + place_stride(tiles, shape.outputs));
    return 2 * one.weights() + std::max(of_block, shape.weight_size());
  }

  // Computes z (+)= bias + the sum over pairs; see CpuConvolution.
  template <typename After>
  void output(ConvPairs<value_t> pairs, value_t* z, const value_t* bias, bool adds,
              value_t* scratch, const After& after) const {
    for (size_t p = 0; p < pairs.size(); ++p) {
      make_output_weights(pairs[p].b, scratch + p * weights(), own(scratch));
    }
    convolve(x_.image, z_, shape_.padding_h, shape_.padding_w, pairs, z, bias, adds, scratch,
             after);
  }

  void input(ConvPairs<value_t> pairs, value_t* dx, bool adds, value_t* scratch) const {
    for (size_t p = 0; p < pairs.size(); ++p) {
      make_input_weights(pairs[p].b, scratch + p * weights(), own(scratch));
    }
    convolve(z_.image, x_, 2 - shape_.padding_h, 2 - shape_.padding_w, pairs, dx, nullptr, adds,
             scratch, [](const Interval&) {});
  }

  // Computes the sum over pairs, [C taps, O], behind the first `weights` numbers of scratch.
  const value_t* weight(ConvPairs<value_t> pairs, value_t* scratch) const {
    const int64_t lines = block_lines(z_), all = examples_ * z_.lines();
    const int64_t chunk = kBlocksOfSum * lines, chunks = ceil_div(all, chunk);
    value_t* total = scratch;
    const auto sum_chunk = [&](int64_t c, value_t* target, value_t* own) {
      bool joins = false;
      for (int64_t line = c * chunk; line < std::min(all, (c + 1) * chunk); line += lines) {
        const Interval part{line, std::min({all, (c + 1) * chunk, line + lines})};
        for (const auto& pair : pairs) {
          join_weights(part, pair, target, joins, own);
          joins = true;
        }
      }
    };
    for (int64_t first = 0; first < chunks; first += threads_) {
      const int64_t together = std::min(threads_, chunks - first);
      in_parts(together, [&](int64_t p) {
        value_t* of_part = scratch + p * this->scratch(shape_);
        const int64_t c = first + p;
        sum_chunk(c, c == 0 ? total : of_part + weights(), of_part + 2 * weights());
      });
      for (int64_t p = first == 0 ? 1 : 0; p < together; ++p) {
        add_to(scratch + p * this->scratch(shape_) + weights(), weights(), total);
      }
    }
    from_places(total, own(scratch));
    return own(scratch);
  }

 private:
  static constexpr int64_t kBlockBytes = 512 << 10, kLeastTiles = 128, kMostTiles = 256;
  static constexpr int64_t kBlocksOfSum = 4, kWeightCost = 100;

  int64_t weights() const { return kPlaces * shape_.channels * shape_.outputs; }
  value_t* own(value_t* scratch) const { return scratch + 2 * weights(); }

  // Distance between two of the 16 places, for so many tiles: an odd number of cache lines, so that
  // the 16 do not fall into the same cache sets.
  static int64_t place_stride(int64_t tiles, int64_t channels) {
    const int64_t vectors = tiles * channels / kWidth;
    return (vectors | 1) * kWidth;
  }

  // Lines of tiles in a block.
  int64_t block_lines(const TileGrid& grid) const {
    const int64_t bytes =
        kPlaces * (shape_.channels + shape_.outputs) * static_cast<int64_t>(sizeof(value_t));
    const int64_t tiles = std::clamp(kBlockBytes / bytes, kLeastTiles, kMostTiles);
    return std::max<int64_t>(1, tiles / grid.columns());
  }

  template <typename Body>
  void in_parts(int64_t parts, const Body& body) const {
    parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      const OneBlasThread one;
      for (int64_t p = begin; p < end; ++p) body(p);
    });
  }

  // Maps images `in` to the images of `grid` with weights [16, C, O] in scratch; serves both directions.
  template <typename After>
  void convolve(const ImageSize& in, const TileGrid& grid, int64_t padding_h, int64_t padding_w,
                ConvPairs<value_t> pairs, value_t* target, const value_t* bias, bool adds,
                value_t* scratch, const After& after) const {
    const int64_t size = block_lines(grid), all = examples_ * grid.lines();
    const int64_t blocks = ceil_div(all, size), parts = std::min(threads_, blocks);
    const int64_t outputs = grid.image.channels;
    in_parts(parts, [&](int64_t part) {
      value_t* v = own(scratch + part * this->scratch(shape_));
      for (int64_t b = blocks * part / parts; b < blocks * (part + 1) / parts; ++b) {
        const Interval lines{b * size, std::min(all, (b + 1) * size)};
        const int64_t tiles = lines.size() * grid.columns();
        const int64_t v_stride = place_stride(tiles, in.channels);
        const int64_t m_stride = place_stride(tiles, outputs);
        value_t* m = v + kPlaces * v_stride;
        for (size_t p = 0; p < pairs.size(); ++p) {
          Tiles::to_v(pairs[p].a, in, grid, lines, padding_h, padding_w, v, v_stride);
          for (int64_t e = 0; e < kPlaces; ++e) {
            const value_t* u = scratch + p * weights() + e * in.channels * outputs;
            multiply<value_t>(tiles, outputs, in.channels, {v + e * v_stride, in.channels}, u,
                              m + e * m_stride, p > 0);
          }
        }
        Tiles::from_m(m, m_stride, grid, lines, bias, adds, target);
        after(grid.rows(lines));
      }
    });
  }

  // Adds the sums over the tiles of some lines to sums [16, C, O], or stores them.
  void join_weights(const Interval& lines, const ConvPair<value_t>& pair, value_t* sums, bool adds,
                    value_t* own) const {
    const int64_t tiles = lines.size() * z_.columns();
    const int64_t channels = shape_.channels, outputs = shape_.outputs;
    const int64_t v_stride = place_stride(tiles, channels), d_stride = place_stride(tiles, outputs);
    value_t *v = own, *d = own + kPlaces * v_stride;
    Tiles::to_v(pair.b, x_.image, z_, lines, shape_.padding_h, shape_.padding_w, v, v_stride);
    Tiles::to_d(pair.a, z_, lines, d, d_stride);
    for (int64_t e = 0; e < kPlaces; ++e) {
      multiply<value_t>(channels, outputs, tiles, {v + e * v_stride, channels, true},
                        d + e * d_stride, sums + e * channels * outputs, adds);
    }
  }

  // Computes U [16, C, O] from w [O, C, 9].
  void make_output_weights(const value_t* w, value_t* u, value_t* own) const {
    PackedWeights::of_planes(shape_).pack(w, own);
    to_places(own, shape_.channels, 9 * shape_.outputs, shape_.outputs, shape_.outputs, false, u);
  }
  // Computes U [16, O, C] of the weights rotated by 180 degrees.
  void make_input_weights(const value_t* w, value_t* u, value_t* own) const {
    PackedWeights(shape_).pack(w, own);
    to_places(own, shape_.outputs, 9 * shape_.channels, shape_.channels, shape_.channels, true, u);
  }

  // Transforms taps, tap_stride apart and each with rows of columns, to u [16, rows, columns].
  static void to_places(const value_t* taps, int64_t rows, int64_t row_stride, int64_t tap_stride,
                        int64_t columns, bool turned, value_t* u) {
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t c = 0; c < columns; c += kWidth) {
        Vec g[3][3], places[4][4];
        for (int tap = 0; tap < 9; ++tap) {
          const int64_t from = turned ? 8 - tap : tap;
          g[tap / 3][tap % 3] = Vec::loadu(taps + row * row_stride + from * tap_stride + c);
        }
        W::template both<3, 4>(W::to_u, g, places);
        value_t* target = u + row * columns + c;
#pragma GCC unroll 16
        for (int e = 0; e < kPlaces; ++e) places[e / 4][e % 4].store(target + e * rows * columns);
      }
    }
  }

  // Computes the gradient [C, 9, O] from its sums.
  void from_places(const value_t* sums, value_t* gradient) const {
    const int64_t channels = shape_.channels, outputs = shape_.outputs;
    for (int64_t row = 0; row < channels; ++row) {
      for (int64_t o = 0; o < outputs; o += kWidth) {
        Vec places[4][4], g[3][3];
#pragma GCC unroll 16
        for (int e = 0; e < kPlaces; ++e) {
          places[e / 4][e % 4] = Vec::loadu(sums + (e * channels + row) * outputs + o);
        }
        W::template both<4, 3>(W::from_sums, places, g);
        for (int tap = 0; tap < 9; ++tap) {
          g[tap / 3][tap % 3].store(gradient + (row * 9 + tap) * outputs + o);
        }
      }
    }
  }

  ConvShape shape_;
  TileGrid x_, z_;
  int64_t examples_, threads_;
};

}  // namespace fastmeta
