// Runs CUDA kernels on the CPU: a fiber a thread, one block after the other. The headers under
// include/ are made of what stands here.
//
// A thread runs until a barrier or a warp operation; then the next one does, in natural, reversed or
// shuffled order. The first thing that a thread does wrong stops the launch, and is its report.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <string>

#include "shared_memory.h"

namespace emulator {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

// Of the running thread.
extern Index thread_index, block_index, block_size, grid_size;

using Where = std::source_location;

// Runs `thread` for each thread of each block. Returns the report; empty if all went well.
std::string run(int64_t blocks, int threads, size_t shared_bytes,
                const std::function<void()>& thread);

// What follows is for the inside of a kernel.

// Waits for all threads of the block; returns how many of them voted.
int count_at_barrier(bool vote, Where where);

struct Lanes {
  static constexpr size_t kMaxBytes = 16;
  unsigned char value[kWarp][kMaxBytes];
};

// Waits for the lanes of `mask`, which must all come to the same operation of the same line. Returns
// the values of all of them. Of all operations, __syncwarp alone orders memory accesses.
inline constexpr const char* kSyncWarp = "__syncwarp";
const Lanes& exchange(const char* operation, unsigned mask, const void* value, size_t bytes,
                      Where where);

int lane();
void* dynamic_shared_memory();
// Fails if the access, made by the instruction before `code`, is not allowed.
void check_access(const void* address, size_t bytes, Access kind, const void* code);
[[noreturn]] void fail(const std::string& what);

// Between launches.

enum class Order { kNatural, kReversed, kShuffled };
void set_order(Order order, uint64_t seed);
// Runs only `count` blocks from `first` on, of those that a launch has; counts from the end where
// `first` is negative. For launches too large to be run whole.
void run_only(int64_t first, int64_t count);
SharedMemory& shared_memory();

// Lets threads pass the barrier of `line`, in a file by the name that it was compiled by, as if the
// source had none there; 0: no barrier is removed.
void remove_barrier(const std::string& file, unsigned line);
// The barriers that threads came to since the last call, removed or not: "file:line", one a line.
std::string take_barriers();

}  // namespace emulator
