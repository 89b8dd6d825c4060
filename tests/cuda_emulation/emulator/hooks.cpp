// What -fsanitize=thread makes of every access to memory: a call, which here goes to the emulator
// instead of ThreadSanitizer.
#include "emulator.h"

using emulator::Access;
using emulator::check_access;

#define HOOKS_OF(bytes)                                                        \
  void __tsan_read##bytes(void* address) {                                     \
    check_access(address, bytes, Access::kRead, __builtin_return_address(0));  \
  }                                                                            \
  void __tsan_write##bytes(void* address) {                                    \
    check_access(address, bytes, Access::kWrite, __builtin_return_address(0)); \
  }                                                                            \
  void __tsan_unaligned_read##bytes(void* address) {                           \
    check_access(address, bytes, Access::kRead, __builtin_return_address(0));  \
  }                                                                            \
  void __tsan_unaligned_write##bytes(void* address) {                          \
    check_access(address, bytes, Access::kWrite, __builtin_return_address(0)); \
  }

extern "C" {
HOOKS_OF(1)
HOOKS_OF(2)
HOOKS_OF(4)
HOOKS_OF(8)
HOOKS_OF(16)

void __tsan_read_range(void* address, size_t bytes) {
  check_access(address, bytes, Access::kRead, __builtin_return_address(0));
}
void __tsan_write_range(void* address, size_t bytes) {
  check_access(address, bytes, Access::kWrite, __builtin_return_address(0));
}
// Of the host's code only: virtual functions, reference counts, the guards of statics.
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
int __tsan_atomic32_fetch_add(int* number, int value, int) {
  return __atomic_fetch_add(number, value, __ATOMIC_SEQ_CST);
}
unsigned char __tsan_atomic8_load(const unsigned char* number, int) {
  return __atomic_load_n(number, __ATOMIC_SEQ_CST);
}
void __tsan_init() {}
}
