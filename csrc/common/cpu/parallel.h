// Parallel loops of the CPU kernels.
//
// OpenMP's team runs them: it is the team of PyTorch's own loops, so the two never compete for
// processors. But its loops end when every thread has come. If another process has the processor of
// one of them, that takes milliseconds. After such a loop other threads help for a while. They take
// pieces from a counter, the caller too, and it waits only for pieces that are under way.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/ceil_div.h"

namespace fastmeta {

inline constexpr int64_t kGrain = 32768;  // elements that repay one more thread

// Threads that a loop begun here may use: torch.get_num_threads(), and 1 inside of a loop.
int64_t thread_count();

namespace parallel {

// Calls piece(loop, i) for every i in [0, count), each on one thread, this one or another. PyTorch,
// OpenMP and the BLAS have one thread meanwhile. Throws the first exception of a piece, after all.
void run(int64_t count, void (*piece)(const void* loop, int64_t i), const void* loop);

}  // namespace parallel

// Calls body(begin, end) on equal ranges of [begin, end) of at least `grain`, at most one a thread.
// Where they are cut depends on the number of threads only.
template <typename Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  if (begin >= end) return;
  const int64_t most = std::min(thread_count(), ceil_div(end - begin, std::max<int64_t>(grain, 1)));
  const int64_t size = ceil_div(end - begin, most), count = ceil_div(end - begin, size);
  if (count == 1) return body(begin, end);
  const auto piece = [&](int64_t i) {
    body(begin + i * size, std::min(end, begin + (i + 1) * size));
  };
  const auto call = [](const void* loop, int64_t i) {
    (*static_cast<const decltype(piece)*>(loop))(i);
  };
  parallel::run(count, call, &piece);
}

// Calls body(begin, end) on ranges of tasks: one range a thread if there are enough tasks. Else one
// range has all of them, so that parallel loops inside body share the threads.
template <typename Body>
void for_each_task_range(int64_t tasks, const Body& body) {
  if (tasks < thread_count()) {
    body(0, tasks);
  } else {
    parallel_for(0, tasks, 1, body);
  }
}

}  // namespace fastmeta
