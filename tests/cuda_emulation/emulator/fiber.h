// A function with a stack of its own, which runs until it suspends itself.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulator {

class Fiber {
 public:
  Fiber();

  // From the start of `entry`, which must not return, at the next resume().
  void start(void (*entry)());
  // Until the fiber suspends; not from inside a fiber.
  void resume();
  // Back to resume(); from inside the fiber.
  void suspend();

  static constexpr size_t kStackBytes = 128 * 1024;
  uintptr_t stack() const { return reinterpret_cast<uintptr_t>(stack_.get()); }

 private:
  static constexpr size_t kShift = 9 * 64, kMaxShift = 32 * 1024;
  std::unique_ptr<char[]> stack_;
  size_t top_;  // where it begins, downwards
#if defined(__x86_64__)
  void* inside_ = nullptr;  // stack pointers of the side that does not run
  void* outside_ = nullptr;
#else
  ucontext_t inside_, outside_;
#endif
};

}  // namespace emulator
