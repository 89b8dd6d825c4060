// Memory of PyTorch's large CPU tensors, kept for the next ones.
//
// A step of the functional engine makes and frees the same large tensors again and again, and the
// C library returns them to the system each time. Taking new pages from it cost up to a third of a
// step. In a scope, large tensors take blocks that earlier ones gave back.
#pragma once

#include <cstdint>

namespace fastmeta {

// Opens a scope in this thread: large CPU tensors that it makes take kept blocks. The first scope
// of the process puts an allocator in front of PyTorch's, which serves everything else.
void begin_keeping_pages();
void end_keeping_pages();

// Gives back the blocks that no tensor uses, and returns how many bytes that is.
int64_t release_pages();

}  // namespace fastmeta
