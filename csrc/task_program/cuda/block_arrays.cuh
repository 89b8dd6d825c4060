// Arrays in the shared memory of a block.
#pragma once

#include "task_program/cuda/host_passes.cuh"

namespace fastmeta {

template <typename value_t>
struct InShared {};

// Numbers of the running block's task from an offset on.
template <typename value_t>
struct Array<InShared<value_t>> {
  int offset = -1;

  FASTMETA_HOST_DEVICE explicit operator bool() const { return offset >= 0; }
  FASTMETA_HOST_DEVICE Array from(int64_t numbers) const {
    return offset < 0 ? Array{} : Array{offset + static_cast<int>(numbers)};
  }
};

template <typename value_t>
class BumpAllocator<InShared<value_t>> {
 public:
  FASTMETA_HOST_DEVICE Array<InShared<value_t>> take(int64_t count) {
    const Array<InShared<value_t>> array{static_cast<int>(used_)};
    used_ += (count + kAlign - 1) / kAlign * kAlign;
    return array;
  }
  FASTMETA_HOST_DEVICE int64_t used() const { return used_; }

 private:
  static constexpr int64_t kAlign = 4;  // numbers that are read at once
  int64_t used_ = 0;
};

}  // namespace fastmeta
