// The executor that is one CPU thread with one task: vectors run along the elements of an array,
// matrix products are brgemm's. Where tasks are fewer than threads, large steps share the threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>

#include <algorithm>
#include <type_traits>

#include "common/gemm.h"
#include "common/parallel.h"
#include "common/transpose.h"
#include "task_program/cpu_math.h"
#include "task_program/executor.h"
#include "task_program/program.h"

namespace fastmeta {

// Consecutive elements of an array: a whole vector, or the rest of one.
template <typename value_t, bool whole>
struct VectorCell {
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
struct ScalarTeam {
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
  static constexpr bool kCompilesEachActivation = true;

  // scratch: product_scratch() elements.
  CpuThread(value_t* scratch, bool shares_threads)
      : scratch_(scratch), shares_threads_(shares_threads) {}

  // What products of a program need for transposed operands.
  static int64_t product_scratch(const Program& program, int64_t examples) {
    int64_t largest = 0;
    for (int k = 0; k < program.instruction_count; ++k) {
      const Instruction& i = program.instructions[k];
      if (i.op != Opcode::kLinear) continue;
      const int64_t rows = examples * program.values[i.y].elements / i.outputs;
      largest = std::max(largest, rows * (i.inputs + i.outputs));
      largest = std::max(largest, i.inputs * i.outputs);
    }
    return largest;
  }

  template <typename F>
  void map(int64_t n, const F& f) {
    in_parts(n, kGrain, [&](int64_t begin, int64_t end) {
      int64_t i = begin;
      for (; i + kWidth <= end; i += kWidth) f(VectorCell<value_t, true>{i, kWidth});
      if (i < end) f(VectorCell<value_t, false>{i, static_cast<int>(end - i)});
    });
  }

  template <typename F>
  void rows(int64_t n, const F& f) {
    for (int64_t row = 0; row < n; ++row) f(ScalarTeam<value_t>{}, row);
  }

  template <typename F>
  void reduce(int64_t n, const F& f, const Array<value_t>& target) {
    Vec sum(value_t(0));
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) sum = sum + f(VectorCell<value_t, true>{i, kWidth});
    if (i < n) {
      const int rest = static_cast<int>(n - i);
      sum = sum + Vec::set(Vec(value_t(0)), f(VectorCell<value_t, false>{i, rest}), rest);
    }
    target.data[0] += at::vec::vec_reduce_all<value_t>([](Vec a, Vec b) { return a + b; }, sum);
  }

  template <typename Finish>
  void product(const Product<value_t>& p, const Finish& finish) {
    if (p.pairs == 0) {
      map(p.m * p.n, FillZero{p.c});
    } else if (p.form == Form::kNT) {
      product_nt(p);
    } else {
      for (int pair = 0; pair < p.pairs; ++pair) {
        const bool accumulates = p.accumulates || pair > 0;
        const value_t* a = p.a[pair].data;
        if (p.form == Form::kTN) {
          transpose(p.k, p.m, a, p.m, scratch_, p.k);
          a = scratch_;
        }
        multiply(p.m, p.n, p.k, a, p.b[pair].data, p.c.data, accumulates);
      }
    }
    if (p.bias) add_bias(p);
    if constexpr (!std::is_same_v<Finish, NoFinish>) map(p.m * p.n, finish);
  }

 private:
  using Vec = at::vec::Vectorized<value_t>;
  static constexpr int kWidth = Vec::size();
  static constexpr int64_t kProductGrain = 1 << 20;  // multiplications worth another thread

  struct FillZero {
    Array<value_t> c;
    template <typename Cell>
    void operator()(const Cell& at) const {
      at.store(c, Vec(value_t(0)));
    }
  };

  template <typename Body>
  void in_parts(int64_t n, int64_t grain, const Body& body) const {
    if (shares_threads_) {
      at::parallel_for(0, n, grain, body);
    } else {
      body(0, n);
    }
  }

  // C = sum of A B'. brgemm wants B [k, n]: either B is turned, or A and C are, whichever is less.
  void product_nt(const Product<value_t>& p) {
    const bool turns_c = p.m * (p.k + p.n) < p.n * p.k;
    value_t* turned = scratch_;
    value_t* c_turned = scratch_ + p.m * p.k;  // [n, m]
    for (int pair = 0; pair < p.pairs; ++pair) {
      const value_t *a = p.a[pair].data, *b = p.b[pair].data;
      if (turns_c) {
        transpose(p.m, p.k, a, p.k, turned, p.m);
        multiply(p.n, p.m, p.k, b, turned, c_turned, pair > 0);
      } else {
        transpose(p.n, p.k, b, p.k, turned, p.n);
        multiply(p.m, p.n, p.k, a, turned, p.c.data, pair > 0);
      }
    }
    if (turns_c) transpose(p.n, p.m, c_turned, p.m, p.c.data, p.n);
  }

  // C [m, n] (+)= A [m, k] B [k, n].
  void multiply(int64_t m, int64_t n, int64_t k, const value_t* a, const value_t* b, value_t* c,
                bool accumulates) const {
    if (m >= n) {
      in_parts(m, grain_of(n * k), [&](int64_t begin, int64_t end) {
        blocked_gemm(end - begin, n, k, a + begin * k, k, b, n, c + begin * n, accumulates);
      });
    } else {
      in_parts(n, grain_of(m * k), [&](int64_t begin, int64_t end) {
        blocked_gemm(m, end - begin, k, a, k, b + begin, n, c + begin, accumulates);
      });
    }
  }

  // gemm() in blocks of B that stay in the cache where B is large: 190 instead of 152 GFLOP/s for
  // 128 x 512 by 512 x 784. Rows of B and C are ldb apart.
  static void blocked_gemm(int64_t m, int64_t n, int64_t k, const value_t* a, int64_t lda,
                           const value_t* b, int64_t ldb, value_t* c, bool accumulates) {
    constexpr int64_t kColumns = 128, kDepth = 256;
    if (n <= 2 * kColumns || k <= kDepth) {
      gemm(m, n, k, a, lda, b, ldb, c, ldb, accumulates);
      return;
    }
    for (int64_t j = 0; j < n; j += kColumns) {
      for (int64_t i = 0; i < k; i += kDepth) {
        gemm(m, std::min(kColumns, n - j), std::min(kDepth, k - i), a + i, lda, b + i * ldb + j,
             ldb, c + j, ldb, accumulates || i > 0);
      }
    }
  }

  static int64_t grain_of(int64_t multiplications) {
    return std::max<int64_t>(kWidth, kProductGrain / std::max<int64_t>(1, multiplications));
  }

  void add_bias(const Product<value_t>& p) {
    for (int64_t row = 0; row < p.m; ++row) {
      value_t* c = p.c.data + row * p.n;
      at::vec::map2<value_t>([](Vec a, Vec b) { return a + b; }, c, c, p.bias.data, p.n);
    }
  }

  value_t* scratch_;
  bool shares_threads_;
};

}  // namespace fastmeta
