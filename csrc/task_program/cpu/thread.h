// Executor on one CPU thread with one task: vectors run along the elements of an array, the BLAS
// does matrix products. If tasks are fewer than threads, large steps share the threads.
#pragma once

#include <ATen/cpu/vec/functional.h>

#include <algorithm>
#include <array>
#include <type_traits>

#include "common/cpu/gemm.h"
#include "common/cpu/parallel.h"
#include "common/cpu/register_gemm.h"
#include "common/cpu/transpose.h"
#include "convolution/cpu/convolution.h"
#include "execution/cpu/images.h"
#include "execution/cpu/math.h"
#include "execution/executor.h"
#include "task_program/cpu/fused_band.h"
#include "task_program/program/program.h"

namespace fastmeta {

// Consecutive elements of an array: a whole vector, or the rest of one.
template <typename value_t, bool whole>
struct VectorAccessor {
  using number_t = at::vec::Vectorized<value_t>;
  int64_t index;
  int count;

  number_t load(const Array<value_t>& a, int64_t offset = 0) const {
    const value_t* source = a.data + offset + index;
    return whole ? number_t::loadu(source) : number_t::loadu(source, count);
  }
  void store(const Array<value_t>& a, const number_t& value, int64_t offset = 0) const {
    if constexpr (whole) {
      value.store(a.data + offset + index);
    } else {
      value.store(a.data + offset + index, count);
    }
  }
  number_t load_one(const Array<value_t>& a, int64_t i) const { return number_t(a.data[i]); }
};

template <typename value_t>
struct ScalarThreadGroup {
  using number_t = value_t;
  static constexpr int lane = 0, size = 1;

  number_t load(const Array<value_t>& a, int64_t i) const { return a.data[i]; }
  void store(const Array<value_t>& a, int64_t i, number_t value) const { a.data[i] = value; }
  number_t sum(number_t x) const { return x; }
  number_t larger(number_t x) const { return x; }
};

template <typename value_t>
class CpuThread {
 public:
  using storage_t = value_t;
  static constexpr bool kCompilesEachActivation = true, kHasImages = true;
  static constexpr bool kHasFusedBands = true;

  // Constructor; scratch has scratch_elements() elements.
  CpuThread(value_t* scratch, bool shares_threads)
      : scratch_(scratch), shares_threads_(shares_threads) {}

  static int64_t scratch_elements(const Program& program, bool shares_threads) {
    int64_t most = 0;
    for (int k = 0; k < program.instruction_count; ++k) {
      const Instruction& i = program.instructions[k];
      // A transposed weight, of a product in registers.
      const bool fits = i.op == Opcode::kLinear && i.inputs * i.outputs <= kMostInRegisters;
      if (fits && !shares_threads) most = std::max(most, i.inputs * i.outputs);
      if (i.op != Opcode::kConvolution) continue;
      most = std::max(most, CpuConvolution<value_t>::scratch(i.conv));
      if (i.is_fused) most = std::max(most, CpuBands<value_t>::scratch(i.conv));
    }
    return most * (shares_threads ? thread_count() : 1);
  }

  template <typename F>
  void map(int64_t n, const F& f) {
    const auto part = [&](int64_t begin, int64_t end) {
      int64_t i = begin;
      for (; i + kWidth <= end; i += kWidth) f(VectorAccessor<value_t, true>{i, kWidth});
      if (i < end) f(VectorAccessor<value_t, false>{i, static_cast<int>(end - i)});
    };
    if (shares_threads_) {
      parallel_for(0, n, kGrain, part);
    } else {
      part(0, n);
    }
  }

  template <typename F>
  void rows(int64_t n, const F& f) {
    for (int64_t row = 0; row < n; ++row) f(ScalarThreadGroup<value_t>{}, row);
  }

  template <typename F>
  void reduce(int64_t n, const F& f, const Array<value_t>& target) {
    // One vector of partial sums: the order does not depend on threads.
    Vec sum(value_t(0));
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) sum = sum + f(VectorAccessor<value_t, true>{i, kWidth});
    if (i < n) {
      const int rest = static_cast<int>(n - i);
      // Elements past the end are not zero after f: masks them.
      sum = sum + Vec::set(Vec(value_t(0)), f(VectorAccessor<value_t, false>{i, rest}), rest);
    }
    target.data[0] += at::vec::vec_reduce_all<value_t>([](Vec a, Vec b) { return a + b; }, sum);
  }

  template <typename Finish>
  void product(const Product<value_t>& p, const Finish& finish) {
    // No product: C is the bias, or zero.
    if (p.pairs == 0) map(p.m * p.n, FillZero{p.c});
    // The BLAS subtracts step_size times the product without an array for it.
    const value_t alpha = p.into.step_size ? -p.into.step_size.data[0] : value_t(1);
    for (int pair = 0; pair < p.pairs; ++pair) {
      multiply_pair(p, p.a[pair].data, p.b[pair].data, p.into.adds || pair > 0, alpha);
    }
    if (p.bias) add_bias(p.m, p.n, p.c.data, p.bias.data);
    if constexpr (!std::is_same_v<Finish, NoFinish>) map(p.m * p.n, finish);
  }

  template <typename Finish>
  void convolution(const Convolution<value_t>& c, const Finish& finish) {
    if (c.pairs == 0) map(c.size(), FillZero{c.c});
    const CpuConvolution<value_t> sum(c.shape, c.examples, shares_threads_);
    std::array<ConvPair<value_t>, 2> both;
    for (int p = 0; p < c.pairs; ++p) both[p] = {c.a[p].data, c.b[p].data};
    const ConvPairs<value_t> pairs(both.data(), c.pairs);
    if (c.pairs > 0) {
      switch (c.to) {
        case MapTo::kOutput:
          outputs(c, sum, pairs);
          break;
        case MapTo::kInput:
          sum.input(pairs, c.c.data, c.into.adds, scratch_);
          break;
        case MapTo::kWeight:
          sum.weight(pairs, c.c.data, c.into.adds,
                     c.into.step_size ? -c.into.step_size.data[0] : value_t(1), scratch_);
          break;
      }
    } else if (c.bias) {
      add_bias(c.size() / c.shape.outputs, c.shape.outputs, c.c.data, c.bias.data);
    }
    if constexpr (!std::is_same_v<Finish, NoFinish>) map(c.size(), finish);
  }

  CpuFusedBand<CpuThread> fused_band(const Network<value_t>& net, const Instruction& conv,
                                     const Instruction& norm) {
    return {*this, net, conv, norm, shares_threads_ ? thread_count() : 1, scratch_};
  }

  template <typename F>
  void table(const Images& images, const F& f) {
    CpuImages<value_t>(images, shares_threads_).table(f);
  }
  template <typename F>
  void column_sums(const Images& images, bool whole_batch, const F& f,
                   const Array<value_t>& target) {
    CpuImages<value_t>(images, shares_threads_).column_sums(whole_batch, f, target.data);
  }
  void column_moments(const Images& images, bool whole_batch, const Array<value_t>& x,
                      const Array<value_t>& target) {
    CpuImages<value_t>(images, shares_threads_).column_moments(whole_batch, x.data, target.data);
  }

 private:
  // Computes outputs, and moments if wanted: right away while outputs are in the cache, unless
  // threads share the work.
  void outputs(const Convolution<value_t>& c, const CpuConvolution<value_t>& sum,
               ConvPairs<value_t> pairs) {
    const CpuImages<value_t> of(c.outputs(), shares_threads_);
    const bool at_once = c.moments && !shares_threads_;
    sum.output(pairs, c.c.data, c.bias.data, c.into.adds, scratch_, [&](const Interval& rows) {
      if (at_once) of.join_moments(c.c.data, rows.begin, rows.end, c.moments.data);
    });
    if (c.moments && !at_once) of.column_moments(true, c.c.data, c.moments.data);
  }

  using Vec = at::vec::Vectorized<value_t>;
  static constexpr int kWidth = Vec::size();

  // Elements of the three matrices of a product that stay in the L2 cache.
  static constexpr int64_t kMostInRegisters = (512 << 10) / sizeof(value_t);

  // Computes C (+)= alpha op(A) op(B): in registers if the operands stay in the L2 cache and a row
  // of C is whole vectors, else by the BLAS.
  void multiply_pair(const Product<value_t>& p, const value_t* a, const value_t* b, bool adds,
                     value_t alpha) {
    const bool left_turned = p.form == Form::kTN, right_turned = p.form == Form::kNT;
    const bool in_registers = !shares_threads_ && p.n % kWidth == 0 &&
                              p.m * p.k + p.k * p.n + p.m * p.n <= kMostInRegisters;
    if (!in_registers) {
      gemm<value_t>(p.m, p.n, p.k, {a, left_turned ? p.m : p.k, left_turned},
                    {b, right_turned ? p.k : p.n, right_turned}, p.c.data, p.n, adds, alpha);
      return;
    }
    if (right_turned) {
      transpose(p.n, p.k, b, p.k, scratch_, p.n);
      b = scratch_;
    }
    RegisterGemm<value_t>::run(p.m, p.n, p.k, {a, left_turned ? p.m : p.k, left_turned}, b,
                               p.c.data, adds, alpha);
  }

  struct FillZero {
    Array<value_t> c;
    template <typename Accessor>
    void operator()(const Accessor& at) const {
      at.store(c, Vec(value_t(0)));
    }
  };

  static void add_bias(int64_t rows, int64_t columns, value_t* c, const value_t* bias) {
    for (int64_t row = 0; row < rows; ++row, c += columns) {
      at::vec::map2<value_t>([](Vec a, Vec b) { return a + b; }, c, c, bias, columns);
    }
  }

  value_t* scratch_;
  bool shares_threads_;
};

}  // namespace fastmeta
