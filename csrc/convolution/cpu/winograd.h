// The three maps of a convolution of 3 x 3 taps that move by one, on the CPU, by the minimal filtering
// of Winograd (Lavin, Gray 2016, arXiv 1509.09308): a tile of 2 x 2 outputs of a channel takes 16
// multiplications instead of 36. With tiles x 4 x 4 of the inputs, z and dz 2 x 2, and g 3 x 3,
//
//   U = G g G',  V = B' x B,  z  = A' [sum over channels of U V] A
//   D = A dz A',              dg = G' [sum over tiles of D V] G
//
// and dx is the z of dz and turned weights. The factors are 0, 1 and 1/2: float32 loses no more
// digits than in sums of products one after the other. A number that is not finite reaches all of a
// tile's outputs.
//
// Tiles are worked on a block of lines at a time, cut at the same places whatever the threads.
#pragma once

#include <ATen/Parallel.h>

#include "convolution/cpu/blas_threads.h"
#include "convolution/cpu/kernels.h"

namespace fastmeta {

// Channels-last images.
struct ImageSize {
  int64_t height, width, channels;

  int64_t elements() const { return height * width * channels; }
};

// Tiles of 2 x 2 pixels, line by line of each image; those of 4 x 4 around them in other images begin
// `padding` before.
struct TileGrid {
  ImageSize image;

  int64_t lines() const { return ceil_div(image.height, int64_t(2)); }
  int64_t columns() const { return ceil_div(image.width, int64_t(2)); }
  // Positions of the images that lines of tiles have.
  Interval rows(const Interval& tile_lines) const {
    return {row_of(tile_lines.begin), row_of(tile_lines.end)};
  }

 private:
  int64_t row_of(int64_t line) const {
    const int64_t images = line / lines(), rest = line % lines();
    return (images * image.height + 2 * rest) * image.width;
  }
};

// The transforms, on vectors of channels.
template <typename value_t>
struct Winograd {
  using Vec = at::vec::Vectorized<value_t>;
  static constexpr int64_t kWidth = Vec::size(), kPlaces = 16;

  // Along one direction.
  static void to_v(const Vec (&d)[4], Vec (&v)[4]) {
    v[0] = d[0] - d[2];
    v[1] = d[1] + d[2];
    v[2] = d[2] - d[1];
    v[3] = d[1] - d[3];
  }
  static void to_d(const Vec (&z)[2], Vec (&d)[4]) {
    d[0] = z[0];
    d[1] = z[0] + z[1];
    d[2] = z[0] - z[1];
    d[3] = Vec(value_t(0)) - z[1];
  }
  static void to_u(const Vec (&g)[3], Vec (&u)[4]) {
    const Vec half(value_t(0.5)), outer = g[0] + g[2];
    u[0] = g[0];
    u[1] = half * (outer + g[1]);
    u[2] = half * (outer - g[1]);
    u[3] = g[2];
  }
  static void from_m(const Vec (&m)[4], Vec (&z)[2]) {
    z[0] = m[0] + m[1] + m[2];
    z[1] = m[1] - m[2] - m[3];
  }
  static void from_sums(const Vec (&s)[4], Vec (&g)[3]) {
    const Vec half(value_t(0.5)), sum = half * (s[1] + s[2]);
    g[0] = s[0] + sum;
    g[1] = half * (s[1] - s[2]);
    g[2] = sum + s[3];
  }

  // Along both: fn is one of the above, target [kTo][kTo] of source [kFrom][kFrom].
  template <int kFrom, int kTo>
  static void both(void (&fn)(const Vec (&)[kFrom], Vec (&)[kTo]),
                   const Vec (&source)[kFrom][kFrom], Vec (&target)[kTo][kTo]) {
    Vec half[kTo][kFrom];
#pragma GCC unroll 4
    for (int j = 0; j < kFrom; ++j) {
      Vec column[kFrom], done[kTo];
#pragma GCC unroll 4
      for (int i = 0; i < kFrom; ++i) column[i] = source[i][j];
      fn(column, done);
#pragma GCC unroll 4
      for (int i = 0; i < kTo; ++i) half[i][j] = done[i];
    }
#pragma GCC unroll 4
    for (int i = 0; i < kTo; ++i) fn(half[i], target[i]);
  }
};

template <typename value_t>
class CpuWinograd {
  using W = Winograd<value_t>;
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

  // Multiplications and what else takes as long, for each pair of channels, of this way and of sums of
  // nine products.
  bool pays() const {
    const int64_t tiles = examples_ * z_.lines() * z_.columns();
    return kPlaces * tiles * 6 / 5 + kWeightCost < 9 * examples_ * shape_.out_positions();
  }

  // Elements for each thread that shares a call.
  static int64_t scratch(const ConvShape& shape) {
    const CpuWinograd one(shape, 1, 1);
    const int64_t lines = std::max(one.block_lines(one.x_), one.block_lines(one.z_));
    const int64_t tiles = lines * std::max(one.x_.columns(), one.z_.columns());
    const int64_t of_block =
        kPlaces * (place_stride(tiles, shape.channels) + place_stride(tiles, shape.outputs));
    return 2 * one.weights() + std::max(of_block, shape.weight_size());
  }

  // z (+)= bias + the sum over pairs; see CpuConvolution.
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

  // The sum over pairs, [C taps, O], which is behind the first `weights` numbers of scratch.
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

  // From a place of 4 x 4 to the next, of so many tiles: an odd number of cache lines, so that
  // the 16 do not meet in the same sets.
  static int64_t place_stride(int64_t tiles, int64_t channels) {
    const int64_t vectors = tiles * channels / kWidth;
    return (vectors | 1) * kWidth;
  }

  // Lines of tiles that are worked on at a time.
  int64_t block_lines(const TileGrid& grid) const {
    const int64_t bytes =
        kPlaces * (shape_.channels + shape_.outputs) * static_cast<int64_t>(sizeof(value_t));
    const int64_t tiles = std::clamp(kBlockBytes / bytes, kLeastTiles, kMostTiles);
    return std::max<int64_t>(1, tiles / grid.columns());
  }

  template <typename Body>
  void in_parts(int64_t parts, const Body& body) const {
    at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      const OneBlasThread one;
      for (int64_t p = begin; p < end; ++p) body(p);
    });
  }

  // For both directions: images `in` to those of `grid`, with weights [16, C, O] in scratch.
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
          to_v(pairs[p].a, in, grid, lines, padding_h, padding_w, v, v_stride);
          for (int64_t e = 0; e < kPlaces; ++e) {
            const value_t* u = scratch + p * weights() + e * in.channels * outputs;
            multiply<value_t>(tiles, outputs, in.channels, {v + e * v_stride, in.channels}, u,
                              m + e * m_stride, p > 0);
          }
        }
        from_m(m, m_stride, grid, lines, bias, adds, target);
        after(grid.rows(lines));
      }
    });
  }

  // body(example, tile line within it, first tile) for each line of tiles.
  template <typename Body>
  static void for_each_line(const TileGrid& grid, const Interval& lines, const Body& body) {
    for (int64_t line = lines.begin; line < lines.end; ++line) {
      body(line / grid.lines(), line % grid.lines(), (line - lines.begin) * grid.columns());
    }
  }

  // V [16][tiles, C] of images, whose pixels beyond the border are 0. Neighbouring tiles share two of
  // their four columns.
  static void to_v(const value_t* images, const ImageSize& in, const TileGrid& grid,
                   const Interval& lines, int64_t padding_h, int64_t padding_w, value_t* v,
                   int64_t stride) {
    for_each_line(grid, lines, [&](int64_t example, int64_t tile_line, int64_t first) {
      const value_t* line[4];
      for (int64_t i = 0; i < 4; ++i) {
        const int64_t h = 2 * tile_line - padding_h + i;
        line[i] = h >= 0 && h < in.height
                      ? images + example * in.elements() + h * in.width * in.channels
                      : nullptr;
      }
      for (int64_t c = 0; c < in.channels; c += kWidth) {
        Vec columns[4][4];
        const auto load_column = [&](int64_t w, Vec(&column)[4]) {
          Vec pixel[4];
          for (int i = 0; i < 4; ++i) {
            const bool is_inside = line[i] != nullptr && w >= 0 && w < in.width;
            pixel[i] = is_inside ? Vec::loadu(line[i] + w * in.channels + c) : Vec(value_t(0));
          }
          W::to_v(pixel, column);
        };
        load_column(-padding_w, columns[0]);
        load_column(1 - padding_w, columns[1]);
        value_t* target = v + first * in.channels + c;
        for (int64_t tile = 0; tile < grid.columns(); ++tile, target += in.channels) {
          load_column(2 * tile - padding_w + 2, columns[2]);
          load_column(2 * tile - padding_w + 3, columns[3]);
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) {
            const Vec row[4] = {columns[0][i], columns[1][i], columns[2][i], columns[3][i]};
            Vec done[4];
            W::to_v(row, done);
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) done[j].store(target + (i * 4 + j) * stride);
            columns[0][i] = columns[2][i];
            columns[1][i] = columns[3][i];
          }
        }
      }
    });
  }

  // fn(pixel's elements, i, j) for those of the 2 x 2 pixels of a tile that the image has.
  template <typename Fn>
  static void for_each_pixel(const TileGrid& grid, int64_t example, int64_t line, int64_t tile,
                             const Fn& fn) {
    const ImageSize& image = grid.image;
    for (int64_t i = 0; i < std::min<int64_t>(2, image.height - 2 * line); ++i) {
      for (int64_t j = 0; j < std::min<int64_t>(2, image.width - 2 * tile); ++j) {
        fn(example * image.elements() +
               ((2 * line + i) * image.width + 2 * tile + j) * image.channels,
           i, j);
      }
    }
  }

  static void from_m(const value_t* m, int64_t stride, const TileGrid& grid, const Interval& lines,
                     const value_t* bias, bool adds, value_t* images) {
    const int64_t channels = grid.image.channels;
    for_each_line(grid, lines, [&](int64_t example, int64_t line, int64_t first) {
      for (int64_t c = 0; c < channels; c += kWidth) {
        const Vec shift = bias != nullptr ? Vec::loadu(bias + c) : Vec(value_t(0));
        for (int64_t tile = 0; tile < grid.columns(); ++tile) {
          const value_t* source = m + (first + tile) * channels + c;
          Vec places[4][4], pixels[2][2];
#pragma GCC unroll 16
          for (int e = 0; e < kPlaces; ++e) places[e / 4][e % 4] = Vec::loadu(source + e * stride);
          W::template both<4, 2>(W::from_m, places, pixels);
          for_each_pixel(grid, example, line, tile, [&](int64_t place, int64_t i, int64_t j) {
            value_t* target = images + place + c;
            const Vec pixel = pixels[i][j] + shift;
            (adds ? Vec::loadu(target) + pixel : pixel).store(target);
          });
        }
      }
    });
  }

  static void to_d(const value_t* images, const TileGrid& grid, const Interval& lines, value_t* d,
                   int64_t stride) {
    const int64_t channels = grid.image.channels;
    for_each_line(grid, lines, [&](int64_t example, int64_t line, int64_t first) {
      for (int64_t c = 0; c < channels; c += kWidth) {
        for (int64_t tile = 0; tile < grid.columns(); ++tile) {
          Vec pixels[2][2] = {{Vec(value_t(0)), Vec(value_t(0))},
                              {Vec(value_t(0)), Vec(value_t(0))}};
          Vec places[4][4];
          for_each_pixel(grid, example, line, tile, [&](int64_t place, int64_t i, int64_t j) {
            pixels[i][j] = Vec::loadu(images + place + c);
          });
          W::template both<2, 4>(W::to_d, pixels, places);
          value_t* target = d + (first + tile) * channels + c;
#pragma GCC unroll 16
          for (int e = 0; e < kPlaces; ++e) places[e / 4][e % 4].store(target + e * stride);
        }
      }
    });
  }

  // sums [16, C, O] (+)= those over the tiles of some lines.
  void join_weights(const Interval& lines, const ConvPair<value_t>& pair, value_t* sums, bool adds,
                    value_t* own) const {
    const int64_t tiles = lines.size() * z_.columns();
    const int64_t channels = shape_.channels, outputs = shape_.outputs;
    const int64_t v_stride = place_stride(tiles, channels), d_stride = place_stride(tiles, outputs);
    value_t *v = own, *d = own + kPlaces * v_stride;
    to_v(pair.b, x_.image, z_, lines, shape_.padding_h, shape_.padding_w, v, v_stride);
    to_d(pair.a, z_, lines, d, d_stride);
    for (int64_t e = 0; e < kPlaces; ++e) {
      multiply<value_t>(channels, outputs, tiles, {v + e * v_stride, channels, true},
                        d + e * d_stride, sums + e * channels * outputs, adds);
    }
  }

  // U [16, C, O] from w [O, C, 9].
  void make_output_weights(const value_t* w, value_t* u, value_t* own) const {
    PackedWeights::of_planes(shape_).pack(w, own);
    to_places(own, shape_.channels, 9 * shape_.outputs, shape_.outputs, shape_.outputs, false, u);
  }
  // U [16, O, C] of the weights that are turned by 180 degrees.
  void make_input_weights(const value_t* w, value_t* u, value_t* own) const {
    PackedWeights(shape_).pack(w, own);
    to_places(own, shape_.outputs, 9 * shape_.channels, shape_.channels, shape_.channels, true, u);
  }

  // u [16, rows, columns] of taps, which are tap_stride apart, each a row of columns.
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

  // The gradient [C, 9, O] from its sums.
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
