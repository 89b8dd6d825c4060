// The three maps for one task on the CPU: patches of a block of rows are put in order in the L2 cache
// (no more of them ever exists), and the BLAS multiplies them with weights packed once a call.
//
// Rows are the output positions of all examples. They are always cut at the same places, whatever
// the number of threads, and sums run over the pieces in order: the bits do not depend on it.
#pragma once

#include <ATen/Parallel.h>

#include "convolution/blas_threads.h"
#include "convolution/cpu_kernels.h"

namespace fastmeta {

template <typename value_t>
class CpuConvolution {
 public:
  struct Nothing {
    void operator()(const Interval&) const {}
  };

  // examples: at least 1. shares_threads: each call is spread over the threads.
  CpuConvolution(const ConvShape& shape, int64_t examples, bool shares_threads)
      : shape_(shape),
        weights_(shape),
        sums_(with_kernel(shape, [](const auto& kernel) { return kernel.is_planar(); })
                  ? PackedWeights::of_planes(shape)
                  : weights_),
        examples_(examples),
        threads_(shares_threads ? at::get_num_threads() : 1) {}

  // Elements that a call needs, for each thread where it shares them.
  static int64_t scratch(const ConvShape& shape) {
    return 2 * shape.weight_size() +
           with_kernel(shape, [](const auto& kernel) { return kernel.scratch(); });
  }

  // z [B, H', W', O] = conv(x, w) + bias, or += that. bias [O] or null. With the rows of z that are
  // ready and still in the cache `after(rows)` is done, on one thread in their order.
  template <typename After = Nothing>
  void output(const value_t* x, const value_t* w, value_t* z, const value_t* bias, bool adds,
              value_t* scratch, const After& after = {}) const {
    const value_t* packed = pack(sums_, w, scratch);
    with_kernel(shape_, [&](const auto& kernel) {
      for_each_part(blocks(kernel.block()), scratch, [&](const Interval& part, value_t* own) {
        for (int64_t b = part.begin; b < part.end; ++b) {
          const Interval rows = piece(b, kernel.block());
          kernel.output(rows, x, packed, z, adds, own);
          for (int64_t row = rows.begin; bias != nullptr && row < rows.end; ++row) {
            add_to(bias, shape_.outputs, z + row * shape_.outputs);
          }
          after(rows);
        }
      });
    });
  }

  // dx [B, H, W, C] = the gradient of the inputs, or += that.
  void input(const value_t* dz, const value_t* w, value_t* dx, bool adds, value_t* scratch) const {
    const value_t* packed = pack(weights_, w, scratch);
    const int64_t size = shape_.in_positions() * shape_.channels;
    with_kernel(shape_, [&](const auto& kernel) {
      // Windows overlap within an example, so a part has whole ones.
      const int64_t group = std::max<int64_t>(1, kernel.block() / shape_.out_positions());
      const auto add_group = [&](const Interval& examples, value_t* own) {
        if (!adds) std::fill_n(dx + examples.begin * size, examples.size() * size, value_t(0));
        const int64_t end = examples.end * shape_.out_positions();
        for (int64_t row = examples.begin * shape_.out_positions(); row < end;) {
          const Interval rows{row, std::min(end, row + kernel.block())};
          kernel.add_input(rows, dz, packed, dx, own);
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

  // dw [O, C / groups, kh, kw] = scale times the gradient of the weights, or += that.
  void weight(const value_t* dz, const value_t* x, value_t* dw, bool adds, value_t scale,
              value_t* scratch) const {
    value_t* total = scratch + shape_.weight_size();
    with_kernel(shape_, [&](const auto& kernel) {
      const int64_t chunk = kBlocksOfSum * kernel.block(), chunks = blocks(chunk);
      const auto sum_chunk = [&](int64_t c, value_t* sum, value_t* own) {
        const Interval rows = piece(c, chunk);
        for (int64_t row = rows.begin; row < rows.end; row += kernel.block()) {
          kernel.weight({row, std::min(rows.end, row + kernel.block())}, dz, x, sum,
                        row > rows.begin, own);
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

  // The pieces of output() and weight(), for those who go through rows in an order of their own;
  // `own` is memory of a kernel, `z` and `dz` may lack the other rows.

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

  // Calls body(part of [0, count), its scratch), a part a thread. In front of that scratch each has
  // two arrays of weights.
  template <typename Body>
  void for_each_part(int64_t count, value_t* scratch, const Body& body) const {
    const int64_t parts = std::min(threads_, count);
    at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
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

  static const value_t* pack(const PackedWeights& weights, const value_t* w, value_t* packed) {
    if (weights.is_identity()) return w;
    weights.pack(w, packed);
    return packed;
  }

  ConvShape shape_;
  PackedWeights weights_, sums_;  // for the inputs' gradient; for outputs and weights' gradient
  int64_t examples_, threads_;
};

}  // namespace fastmeta
