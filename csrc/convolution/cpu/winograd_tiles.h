// Tiles of images for winograd.h: the transforms of one tile, and of all tiles of some lines.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <algorithm>

#include "common/ceil_div.h"
#include "convolution/cpu/patches.h"

namespace fastmeta {

// Size of channels-last images.
struct ImageSize {
  int64_t height, width, channels;

  int64_t elements() const { return height * width * channels; }
};

// Tiles of 2 x 2 pixels, line by line of each image. The tiles of 4 x 4 around them in the other
// images begin `padding` before.
struct TileGrid {
  ImageSize image;

  int64_t lines() const { return ceil_div(image.height, int64_t(2)); }
  int64_t columns() const { return ceil_div(image.width, int64_t(2)); }
  // Positions of the images in lines of tiles.
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

  // Transforms along one direction.
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

  // Transforms along both directions: fn is one of the above, target [kTo][kTo], source
  // [kFrom][kFrom].
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

// Transforms of all tiles of some lines; arrays [16][tiles, C], whose 16 places are `stride` apart.
template <typename value_t>
struct WinogradTiles {
  using W = Winograd<value_t>;
  using Vec = typename W::Vec;
  static constexpr int64_t kPlaces = W::kPlaces, kWidth = W::kWidth;

  // Calls body(example, tile line within it, first tile) for each line of tiles.
  template <typename Body>
  static void for_each_line(const TileGrid& grid, const Interval& lines, const Body& body) {
    for (int64_t line = lines.begin; line < lines.end; ++line) {
      body(line / grid.lines(), line % grid.lines(), (line - lines.begin) * grid.columns());
    }
  }

  // Computes V [16][tiles, C] of images; pixels beyond the border are 0. Neighbouring tiles share
  // two of their four columns.
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

  // Calls fn(pixel's elements, i, j) for the pixels of a 2 x 2 tile that lie in the image.
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
};

}  // namespace fastmeta
