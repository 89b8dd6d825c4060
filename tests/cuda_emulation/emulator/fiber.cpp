#include "fiber.h"

#include <cstdint>

namespace emulator {

// Stacks begin at distances of 128 KiB, of which a cache holds few lines: each has its own shift.
Fiber::Fiber() : stack_(new char[kStackBytes]) {
  static size_t count = 0;
  top_ = kStackBytes - count++ * kShift % kMaxShift;
}

#if defined(__x86_64__)

// Saves the registers that a callee must keep on the stack and the stack pointer at `save`, and goes
// on where `load` was saved. swapcontext would make a system call for the signal mask each time.
extern "C" void emulator_switch_stack(void** save, void* load);
asm(R"(
.text
.type emulator_switch_stack, @function
emulator_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch_stack, . - emulator_switch_stack
)");

void Fiber::start(void (*entry)()) {
  constexpr int kSavedRegisters = 6;
  const uintptr_t top = reinterpret_cast<uintptr_t>(stack_.get() + top_) / 16 * 16;
  auto** frame = reinterpret_cast<void**>(top) - kSavedRegisters - 2;
  for (int i = 0; i < kSavedRegisters; ++i) frame[i] = nullptr;
  frame[kSavedRegisters] = reinterpret_cast<void*>(entry);  // where `ret` goes
  frame[kSavedRegisters + 1] = nullptr;                     // what `entry` would return to
  inside_ = frame;
}

void Fiber::resume() { emulator_switch_stack(&outside_, inside_); }

void Fiber::suspend() { emulator_switch_stack(&inside_, outside_); }

#else

void Fiber::start(void (*entry)()) {
  getcontext(&inside_);
  inside_.uc_stack.ss_sp = stack_.get();
  inside_.uc_stack.ss_size = top_;
  inside_.uc_link = nullptr;
  makecontext(&inside_, entry, 0);
}

void Fiber::resume() { swapcontext(&outside_, &inside_); }

void Fiber::suspend() { swapcontext(&inside_, &outside_); }

#endif

}  // namespace emulator
