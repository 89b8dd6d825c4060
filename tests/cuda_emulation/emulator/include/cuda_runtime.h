// CUDA for a C++ compiler: what kernels and launchers use of the language and of the runtime. The
// mask of a warp operation is checked, and so is what it reads; see emulator.h.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <type_traits>

#include "emulator.h"
#include "runtime.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
// A slot of its own for each array, so that what lies behind its end is nobody's.
#define __shared__ static __attribute__((aligned(::emulator::SharedMemory::kSlot)))

#define threadIdx ::emulator::thread_index
#define blockIdx ::emulator::block_index
#define blockDim ::emulator::block_size
#define gridDim ::emulator::grid_size

using emulator::Where;

// Barriers of a block.

inline int __syncthreads_count(int vote, Where where = Where::current()) {
  return emulator::count_at_barrier(vote != 0, where);
}
inline void __syncthreads(Where where = Where::current()) {
  emulator::count_at_barrier(false, where);
}
inline int __syncthreads_or(int vote, Where where = Where::current()) {
  return emulator::count_at_barrier(vote != 0, where) > 0;
}
inline int __syncthreads_and(int vote, Where where = Where::current()) {
  return emulator::count_at_barrier(vote == 0, where) == 0;
}

// Operations of a warp.

namespace emulator {

template <typename value_t>
value_t value_of(const Lanes& lanes, int lane) {
  value_t value;
  std::memcpy(&value, lanes.value[lane], sizeof(value_t));
  return value;
}

// The value of lane `source`, this lane's own where there is none in its part of `width` lanes.
template <typename value_t>
value_t shuffle(const char* operation, unsigned mask, value_t value, int source, bool is_inside,
                Where where) {
  static_assert(sizeof(value_t) <= Lanes::kMaxBytes && std::is_trivially_copyable_v<value_t>);
  const auto& lanes = exchange(operation, mask, &value, sizeof(value_t), where);
  if (!is_inside) return value;
  if ((mask >> source & 1) == 0) {
    fail(std::string("reads by ") + operation + " lane " + std::to_string(source) +
         ", which its mask does not name");
  }
  return value_of<value_t>(lanes, source);
}

// combine(.., ..) over the values of the lanes of `mask`, in the order of lanes.
template <typename value_t, typename Combine>
value_t reduce(const char* operation, unsigned mask, value_t value, Where where,
               const Combine& combine) {
  const auto& lanes = exchange(operation, mask, &value, sizeof(value_t), where);
  value_t result = value_of<value_t>(lanes, std::countr_zero(mask));
  for (unsigned rest = mask & (mask - 1); rest != 0; rest &= rest - 1) {
    result = combine(result, value_of<value_t>(lanes, std::countr_zero(rest)));
  }
  return result;
}

}  // namespace emulator

template <typename value_t>
value_t __shfl_sync(unsigned mask, value_t value, int source, int width = emulator::kWarp,
                    Where where = Where::current()) {
  const int first = emulator::lane() / width * width;
  return emulator::shuffle("__shfl_sync", mask, value, first + (source & (width - 1)), true, where);
}

template <typename value_t>
value_t __shfl_up_sync(unsigned mask, value_t value, unsigned delta, int width = emulator::kWarp,
                       Where where = Where::current()) {
  const int source = emulator::lane() - static_cast<int>(delta);
  const bool is_inside = source >= emulator::lane() / width * width;
  return emulator::shuffle("__shfl_up_sync", mask, value, source, is_inside, where);
}

template <typename value_t>
value_t __shfl_down_sync(unsigned mask, value_t value, unsigned delta, int width = emulator::kWarp,
                         Where where = Where::current()) {
  const int source = emulator::lane() + static_cast<int>(delta);
  const bool is_inside = source < emulator::lane() / width * width + width;
  return emulator::shuffle("__shfl_down_sync", mask, value, source, is_inside, where);
}

template <typename value_t>
value_t __shfl_xor_sync(unsigned mask, value_t value, int lanes, int width = emulator::kWarp,
                        Where where = Where::current()) {
  const int source = emulator::lane() ^ lanes;
  const bool is_inside = source < emulator::lane() / width * width + width;
  return emulator::shuffle("__shfl_xor_sync", mask, value, source, is_inside, where);
}

inline unsigned __ballot_sync(unsigned mask, int vote, Where where = Where::current()) {
  const unsigned own = vote != 0 ? 1U << emulator::lane() : 0;
  return emulator::reduce("__ballot_sync", mask, own, where, std::bit_or<unsigned>());
}
inline int __any_sync(unsigned mask, int vote, Where where = Where::current()) {
  return emulator::reduce("__any_sync", mask, vote != 0, where, std::logical_or<bool>());
}
inline int __all_sync(unsigned mask, int vote, Where where = Where::current()) {
  return emulator::reduce("__all_sync", mask, vote != 0, where, std::logical_and<bool>());
}
template <typename value_t>
unsigned __match_any_sync(unsigned mask, value_t value, Where where = Where::current()) {
  const auto& lanes = emulator::exchange("__match_any_sync", mask, &value, sizeof(value_t), where);
  unsigned same = 0;
  for (unsigned rest = mask; rest != 0; rest &= rest - 1) {
    const int lane = std::countr_zero(rest);
    if (emulator::value_of<value_t>(lanes, lane) == value) same |= 1U << lane;
  }
  return same;
}

template <typename value_t>
value_t __reduce_add_sync(unsigned mask, value_t value, Where where = Where::current()) {
  return emulator::reduce("__reduce_add_sync", mask, value, where, std::plus<value_t>());
}
template <typename value_t>
value_t __reduce_min_sync(unsigned mask, value_t value, Where where = Where::current()) {
  return emulator::reduce("__reduce_min_sync", mask, value, where,
                          [](value_t a, value_t b) { return std::min(a, b); });
}
template <typename value_t>
value_t __reduce_max_sync(unsigned mask, value_t value, Where where = Where::current()) {
  return emulator::reduce("__reduce_max_sync", mask, value, where,
                          [](value_t a, value_t b) { return std::max(a, b); });
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value, Where where = Where::current()) {
  return emulator::reduce("__reduce_and_sync", mask, value, where, std::bit_and<unsigned>());
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value, Where where = Where::current()) {
  return emulator::reduce("__reduce_or_sync", mask, value, where, std::bit_or<unsigned>());
}
inline unsigned __reduce_xor_sync(unsigned mask, unsigned value, Where where = Where::current()) {
  return emulator::reduce("__reduce_xor_sync", mask, value, where, std::bit_xor<unsigned>());
}

inline void __syncwarp(unsigned mask = 0xffffffffU, Where where = Where::current()) {
  emulator::exchange(emulator::kSyncWarp, mask, nullptr, 0, where);
}

// Atomics: a thread is not interrupted, so each is a plain read and write that is logged as atomic.

#define EMULATED_ATOMIC(name, result)                                           \
  template <typename value_t>                                                   \
  __attribute__((noinline, no_sanitize("thread"))) value_t name(                \
      value_t* address, std::type_identity_t<value_t> value) {                  \
    emulator::check_access(address, sizeof(value_t), emulator::Access::kAtomic, \
                           __builtin_return_address(0));                        \
    const value_t old = *address;                                               \
    *address = result;                                                          \
    return old;                                                                 \
  }
EMULATED_ATOMIC(atomicAdd, old + value)
EMULATED_ATOMIC(atomicSub, old - value)
EMULATED_ATOMIC(atomicExch, value)
EMULATED_ATOMIC(atomicMin, old < value ? old : value)
EMULATED_ATOMIC(atomicMax, old < value ? value : old)
EMULATED_ATOMIC(atomicAnd, old& value)
EMULATED_ATOMIC(atomicOr, old | value)
EMULATED_ATOMIC(atomicXor, old ^ value)
#undef EMULATED_ATOMIC

template <typename value_t>
__attribute__((noinline, no_sanitize("thread"))) value_t atomicCAS(
    value_t* address, std::type_identity_t<value_t> compare, std::type_identity_t<value_t> value) {
  emulator::check_access(address, sizeof(value_t), emulator::Access::kAtomic,
                         __builtin_return_address(0));
  const value_t old = *address;
  if (old == compare) *address = value;
  return old;
}

inline void __threadfence() {}
inline void __threadfence_block() {}

// Arithmetic.

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
template <typename value_t>
value_t __ldg(const value_t* address) {
  return *address;
}
