// The three maps for one task on the CPU, each the sum over one or two pairs of arrays. Patches of
// a block of rows are gathered in the L2 cache (no more of them ever exists), and multiplied with
// weights packed once a call. If it takes less work, minimal filtering (winograd.h) is used
// instead.
//
// Rows are the output positions of all examples. They are always cut at the same places, and sums
// run over the pieces in order: the bits do not depend on the number of threads.
#pragma once

#include <array>

#include "common/cpu/blas_threads.h"
#include "common/cpu/parallel.h"
#include "convolution/cpu/winograd.h"

namespace fastmeta {

template <typename value_t>
class CpuConvolution {
 public:
  struct Nothing {
    void operator()(const Interval&) const {}
  };

  // Constructor; examples is at least 1. shares_threads: each call is spread over the threads.
  CpuConvolution(const ConvShape& shape, int64_t examples, bool shares_threads)
      : shape_(shape),
        examples_(examples),
        threads_(shares_threads ? thread_count() : 1),
        winograd_(shape, examples, threads_),
        by_winograd_(winograd_.takes(shape) && winograd_.pays()),
        weights_(shape),
        sums_(by_winograd_ || with_kernel(shape, [](const auto& k) { return k.is_planar(); })
                  ? PackedWeights::of_planes(shape)
                  : weights_) {}

  // Workspace elements of a call, for each thread if the call shares them.
  static int64_t scratch(const ConvShape& shape) {
    const int64_t of_patches = 2 * shape.weight_size() + with_kernel(shape, [](const auto& kernel) {
                                 return kernel.scratch();
                               });
    using Winograd = CpuWinograd<value_t>;
    return Winograd::takes(shape) ? std::max(of_patches, Winograd::scratch(shape)) : of_patches;
  }

  // Computes z [B, H', W', O] = the sum of conv(x, w) + bias, or adds it to z. bias [O] or null.
  // Calls `after(rows)` for rows of z that are complete and still in the cache, on one thread in
  // their order.
  template <typename After = Nothing>
  void output(ConvPairs<value_t> pairs, value_t* z, const value_t* bias, bool adds,
              value_t* scratch, const After& after = {}) const {
    if (by_winograd_) return winograd_.output(pairs, z, bias, adds, scratch, after);
    const auto packed = packed_weights(sums_, pairs, scratch);
    with_kernel(shape_, [&](const auto& kernel) {
      for_each_part(blocks(kernel.block()), scratch, [&](const Interval& part, value_t* own) {
        for (int64_t b = part.begin; b < part.end; ++b) {
          const Interval rows = piece(b, kernel.block());
          for (size_t p = 0; p < pairs.size(); ++p) {
            kernel.output(rows, pairs[p].a, packed[p], z, adds || p > 0, own);
          }
          for (int64_t row = rows.begin; bias != nullptr && row < rows.end; ++row) {
            add_to(bias, shape_.outputs, z + row * shape_.outputs);
          }
          after(rows);
        }
      });
    });
  }

  // Computes dx [B, H, W, C] = the gradient of the inputs, or adds it to dx.
  void input(ConvPairs<value_t> pairs, value_t* dx, bool adds, value_t* scratch) const {
    if (by_winograd_) return winograd_.input(pairs, dx, adds, scratch);
    const auto packed = packed_weights(weights_, pairs, scratch);
    const int64_t size = shape_.in_positions() * shape_.channels;
    with_kernel(shape_, [&](const auto& kernel) {
      // Windows overlap within an example, so a part has whole examples.
      const int64_t group = std::max<int64_t>(1, kernel.block() / shape_.out_positions());
      const auto add_group = [&](const Interval& examples, value_t* own) {
        if (!adds) std::fill_n(dx + examples.begin * size, examples.size() * size, value_t(0));
        const int64_t end = examples.end * shape_.out_positions();
        for (int64_t row = examples.begin * shape_.out_positions(); row < end;) {
          const Interval rows{row, std::min(end, row + kernel.block())};
          for (size_t p = 0; p < pairs.size(); ++p) {
            kernel.add_input(rows, pairs[p].a, packed[p], dx, own);
          }
          row = rows.end;
        }
      };
      for_each_part(ceil_div(examples_, group), scratch, [&](const Interval& part, value_t* own) {
        for (int64_t g = part.begin; g < part.end; ++g) {
          add_group({g * group, std::min(examples_, (g + 1) * group)}, own);
        }
      });
    });
  }

  // Computes dw [O, C / groups, kh, kw] = scale times the gradient of the weights, or adds it to
  // dw.
  void weight(ConvPairs<value_t> pairs, value_t* dw, bool adds, value_t scale,
              value_t* scratch) const {
    if (by_winograd_) {
      return write_weights(winograd_.weight(pairs, scratch), adds, scale, scratch, dw);
    }
    value_t* total = scratch + shape_.weight_size();
    with_kernel(shape_, [&](const auto& kernel) {
      const int64_t chunk = kBlocksOfSum * kernel.block(), chunks = blocks(chunk);
      const auto sum_chunk = [&](int64_t c, value_t* sum, value_t* own) {
        const Interval rows = piece(c, chunk);
        for (int64_t row = rows.begin; row < rows.end; row += kernel.block()) {
          const Interval block{row, std::min(rows.end, row + kernel.block())};
          for (size_t p = 0; p < pairs.size(); ++p) {
            kernel.weight(block, pairs[p].a, pairs[p].b, sum, row > rows.begin || p > 0, own);
          }
        }
      };
      for (int64_t first = 0; first < chunks; first += threads_) {
        const int64_t together = std::min(threads_, chunks - first);
        for_each_part(together, scratch, [&](const Interval& part, value_t* own) {
          const int64_t c = first + part.begin;
          sum_chunk(c, c == 0 ? total : sum_of(part.begin, scratch), own);
        });
        for (int64_t c = first == 0 ? 1 : 0; c < together; ++c) {
          add_to(sum_of(c, scratch), shape_.weight_size(), total);
        }
      }
    });
    write_weights(total, adds, scale, scratch, dw);
  }

  // Pieces of output() and weight(), for callers with an order of rows of their own. `own` is a
  // kernel's workspace; `z` and `dz` may lack the other rows.

  const value_t* packed(const value_t* w, value_t* room) const { return pack(sums_, w, room); }

  void output_rows(const Interval& rows, const value_t* x, const value_t* packed, value_t* z,
                   value_t* own) const {
    for_each_block(rows, [&](const auto& kernel, const Interval& block) {
      kernel.output(block, x, packed, z, false, own);
    });
  }
  void weight_rows(const Interval& rows, const value_t* dz, const value_t* x, value_t* sum,
                   bool adds, value_t* own) const {
    for_each_block(rows, [&](const auto& kernel, const Interval& block) {
      kernel.weight(block, dz, x, sum, adds || block.begin > rows.begin, own);
    });
  }
  void write_weights(const value_t* packed, bool adds, value_t scale, value_t* room,
                     value_t* dw) const {
    const value_t* sum = packed;
    if (!adds && scale == 1 && !sums_.is_identity()) return sums_.unpack(packed, dw);
    if (!sums_.is_identity()) {
      sums_.unpack(packed, room);
      sum = room;
    }
    const Vec factor(scale);
    if (adds) {
      at::vec::map2<value_t>([factor](Vec d, Vec s) { return at::vec::fmadd(factor, s, d); }, dw,
                             dw, sum, shape_.weight_size());
    } else {
      at::vec::map<value_t>([factor](Vec s) { return factor * s; }, dw, sum, shape_.weight_size());
    }
  }

 private:
  using Vec = at::vec::Vectorized<value_t>;
  static constexpr int64_t kBlocksOfSum = 4;

  template <typename F>
  static auto with_kernel(const ConvShape& shape, const F& f) {
    return shape.is_depthwise() ? f(CpuDepthwise<value_t>(shape)) : f(CpuDense<value_t>(shape));
  }

  template <typename Body>
  void for_each_block(const Interval& rows, const Body& body) const {
    with_kernel(shape_, [&](const auto& kernel) {
      for (int64_t row = rows.begin; row < rows.end; row += kernel.block()) {
        body(kernel, Interval{row, std::min(rows.end, row + kernel.block())});
      }
    });
  }

  int64_t rows() const { return examples_ * shape_.out_positions(); }
  int64_t blocks(int64_t size) const { return ceil_div(rows(), size); }
  Interval piece(int64_t index, int64_t size) const {
    return {index * size, std::min(rows(), (index + 1) * size)};
  }

  // Calls body(part of [0, count), its scratch), a part a thread. Two arrays of weights lie in
  // front of each scratch.
  template <typename Body>
  void for_each_part(int64_t count, value_t* scratch, const Body& body) const {
    const int64_t parts = std::min(threads_, count);
    parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      const OneBlasThread one;
      for (int64_t p = begin; p < end; ++p) {
        body(Interval{count * p / parts, count * (p + 1) / parts},
             sum_of(p, scratch) + 2 * shape_.weight_size());
      }
    });
  }
  value_t* sum_of(int64_t part, value_t* scratch_) const {
    return scratch_ + part * scratch(shape_);
  }

  // Packs the weights of one or two pairs.
  std::array<const value_t*, 2> packed_weights(const PackedWeights& weights,
                                               ConvPairs<value_t> pairs, value_t* room) const {
    std::array<const value_t*, 2> packed{};
    for (size_t p = 0; p < pairs.size(); ++p) {
      packed[p] = pack(weights, pairs[p].b, room + p * shape_.weight_size());
    }
    return packed;
  }
  static const value_t* pack(const PackedWeights& weights, const value_t* w, value_t* packed) {
    if (weights.is_identity()) return w;
    weights.pack(w, packed);
    return packed;
  }

  ConvShape shape_;
  int64_t examples_, threads_;
  CpuWinograd<value_t> winograd_;
  bool by_winograd_;
  PackedWeights weights_, sums_;  // for dx; for z and dw
};

}  // namespace fastmeta
