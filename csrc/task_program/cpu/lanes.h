// Executor on one CPU thread with as many tasks as a vector has lanes: arrays hold vectors, lane l
// the number of task l. Small layers fill whole vectors this way, and a product needs no transposed
// operand. A meta-step of 16 tasks of a 1-40-40-1 network took one thread 72 us, where two threads
// with a task at a time took 117.
#pragma once

#include <type_traits>

#include "execution/cpu/math.h"
#include "execution/executor.h"

namespace fastmeta {

template <typename value_t>
struct LanesAccessor {
  using number_t = at::vec::Vectorized<value_t>;
  int64_t index;

  const number_t& load(const Array<number_t>& a, int64_t offset = 0) const {
    return a.data[offset + index];
  }
  void store(const Array<number_t>& a, const number_t& value, int64_t offset = 0) const {
    a.data[offset + index] = value;
  }
  const number_t& load_one(const Array<number_t>& a, int64_t i) const { return a.data[i]; }
};

template <typename value_t>
struct LanesThreadGroup {
  using number_t = at::vec::Vectorized<value_t>;
  static constexpr int lane = 0, size = 1;

  const number_t& load(const Array<number_t>& a, int64_t i) const { return a.data[i]; }
  void store(const Array<number_t>& a, int64_t i, const number_t& value) const {
    a.data[i] = value;
  }
  const number_t& sum(const number_t& x) const { return x; }
  const number_t& larger(const number_t& x) const { return x; }
};

template <typename value_t>
class CpuLanes {
 public:
  using storage_t = at::vec::Vectorized<value_t>;
  static constexpr bool kCompilesEachActivation = true, kHasImages = false;
  static constexpr bool kHasFusedBands = false;

  template <typename F>
  void map(int64_t n, const F& f) {
    for (int64_t i = 0; i < n; ++i) f(LanesAccessor<value_t>{i});
  }

  template <typename F>
  void rows(int64_t n, const F& f) {
    for (int64_t row = 0; row < n; ++row) f(LanesThreadGroup<value_t>{}, row);
  }

  template <typename F>
  void reduce(int64_t n, const F& f, const Array<storage_t>& target) {
    storage_t sum(value_t(0));
    for (int64_t i = 0; i < n; ++i) sum = sum + f(LanesAccessor<value_t>{i});
    target.data[0] = target.data[0] + sum;
  }

  template <typename Finish>
  void product(const Product<storage_t>& p, const Finish& finish) {
    int64_t column = 0;
    for (; column + kColumns <= p.n; column += kColumns) all_rows<kColumns>(p, column, finish);
    for (; column < p.n; ++column) all_rows<1>(p, column, finish);
  }

 private:
  // A tile of C in registers: 5 x 4 with 32 vector registers, 3 x 3 with 16.
  static constexpr bool kHasManyRegisters = storage_t::size() * sizeof(value_t) == 64;
  static constexpr int kRows = kHasManyRegisters ? 5 : 3, kColumns = kHasManyRegisters ? 4 : 3;

  template <int columns, typename Finish>
  static void all_rows(const Product<storage_t>& p, int64_t column, const Finish& finish) {
    int64_t row = 0;
    for (; row + kRows <= p.m; row += kRows) tile<kRows, columns>(p, row, column, finish);
    for (; row < p.m; ++row) tile<1, columns>(p, row, column, finish);
  }

  // Calls finish() while the tile is in the L1 cache. Not inlined: the caller's variables would
  // take the registers of the strides.
  template <int rows, int columns, typename Finish>
  [[gnu::noinline]] static void tile(const Product<storage_t>& p, int64_t row, int64_t column,
                                     const Finish& finish) {
    storage_t sum[rows][columns];
    const bool adds = p.into.adds && !p.into.step_size;
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < columns; ++j) {
        sum[i][j] = adds     ? p.c.data[(row + i) * p.n + column + j]
                    : p.bias ? p.bias.data[column + j]
                             : storage_t(value_t(0));
      }
    }
    // Row i of A at k is a[i a_row + k a_step]; column j of B is b[j b_column + k b_step].
    const int64_t a_row = p.form == Form::kTN ? 1 : p.k, a_step = p.form == Form::kTN ? p.m : 1;
    const int64_t b_column = p.form == Form::kNT ? p.k : 1, b_step = p.form == Form::kNT ? 1 : p.n;
    for (int pair = 0; pair < p.pairs; ++pair) {
      const storage_t* a = p.a[pair].data + row * a_row;
      const storage_t* b = p.b[pair].data + column * b_column;
#pragma GCC unroll 4
      for (int64_t k = 0; k < p.k; ++k, a += a_step, b += b_step) {
        storage_t left[rows];
#pragma GCC unroll 8
        for (int i = 0; i < rows; ++i) left[i] = a[i * a_row];
#pragma GCC unroll 8
        for (int j = 0; j < columns; ++j) {
          const storage_t right = b[j * b_column];
#pragma GCC unroll 8
          for (int i = 0; i < rows; ++i) sum[i][j] = at::vec::fmadd(left[i], right, sum[i][j]);
        }
      }
    }
    const bool descends = static_cast<bool>(p.into.step_size);
    const storage_t down = descends ? p.into.step_size.data[0].neg() : storage_t(value_t(0));
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      storage_t* c = p.c.data + (row + i) * p.n + column;
#pragma GCC unroll 8
      for (int j = 0; j < columns; ++j) {
        c[j] = descends ? at::vec::fmadd(down, sum[i][j], c[j]) : sum[i][j];
      }
    }
    if constexpr (!std::is_same_v<Finish, NoFinish>) {
      for (int i = 0; i < rows; ++i) {
        for (int j = 0; j < columns; ++j) {
          finish(LanesAccessor<value_t>{(row + i) * p.n + column + j});
        }
      }
    }
  }
};

}  // namespace fastmeta
