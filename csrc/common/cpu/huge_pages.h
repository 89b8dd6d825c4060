// Huge pages for large memory: the kernel's first touch of each small page costs time.
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdint>

#include "common/ceil_div.h"

namespace fastmeta {

constexpr uintptr_t kHugePage = 2 << 20;

inline void use_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#ifdef __linux__
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = ceil_div(begin, kHugePage) * kHugePage;
  const uintptr_t end = (begin + bytes) / kHugePage * kHugePage;
  // The kernel may ignore the hint; then the pages are small.
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

}  // namespace fastmeta
