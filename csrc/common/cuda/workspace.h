// Workspace of a launcher: arrays taken one after the other out of one allocation.
#pragma once

#include <cstdint>

namespace fastmeta {

// Bump allocator. With base 0 it only adds up the bytes that are needed.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(reinterpret_cast<uintptr_t>(base)) {}

  template <typename value_t>
  value_t* take(int64_t count) {
    const uintptr_t address = base_ + bytes_;
    bytes_ += (count * static_cast<int64_t>(sizeof(value_t)) + kAlign - 1) / kAlign * kAlign;
    return reinterpret_cast<value_t*>(address);
  }

  int64_t bytes() const { return bytes_; }

 private:
  static constexpr int64_t kAlign = 256;
  uintptr_t base_;
  int64_t bytes_ = 0;
};

}  // namespace fastmeta
