#pragma once

#include <ATen/Parallel.h>

#include <cstdint>

namespace fastmeta {

inline constexpr int64_t kGrain = 32768;  // elements that repay one more thread

// Calls body(begin, end) on ranges of tasks: one range a thread if there are enough tasks. Else one
// range has all of them, so that parallel loops inside body share the threads.
template <typename Body>
void for_each_task_range(int64_t tasks, const Body& body) {
  if (tasks < at::get_num_threads()) {
    body(0, tasks);
  } else {
    at::parallel_for(0, tasks, 1, body);
  }
}

}  // namespace fastmeta
