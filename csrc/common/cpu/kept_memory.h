// Scratch memory of CPU kernels.
#pragma once

#include <ATen/ops/empty.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdint>

#include "common/ceil_div.h"

namespace fastmeta {

// New pages cost time one by one.
inline void use_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kHugePage = 2 << 20;
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = ceil_div(begin, kHugePage) * kHugePage;
  const uintptr_t end = (begin + bytes) / kHugePage * kHugePage;
  // A hint: without it the pages are small.
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

// So many bytes, kept for this thread's next call up to 1 GiB: pages new to the process cost a small
// job as much time as its arithmetic, and were a fifth of a profile of images of 84 x 84.
inline at::Tensor kept_memory(int64_t bytes) {
  constexpr int64_t kMostKept = 1 << 30;
  thread_local at::Tensor kept;
  if (kept.defined() && kept.numel() >= bytes) return kept;
  kept = at::Tensor();
  auto memory = at::empty({bytes}, at::kByte);
  use_huge_pages(memory.mutable_data_ptr(), bytes);
  if (bytes <= kMostKept) kept = memory;
  return memory;
}

}  // namespace fastmeta
