// Runs the task program on the CPU: threads take tasks, or groups of as many tasks as a vector has
// lanes.
#pragma once

#include <ATen/cpu/vec/functional.h>

#include <algorithm>
#include <vector>

#include "common/ceil_div.h"
#include "common/cpu/denormals.h"
#include "common/cpu/parallel.h"
#include "common/cpu/workspace.h"
#include "task_program/cpu/worker.h"

namespace fastmeta {

// Cost of a group of tasks in lanes, in tasks taken one after the other.
inline constexpr int64_t kGroupCost = 5;
// Most parameters of a task for which a group's arrays stay in the L2 cache.
inline constexpr int64_t kMostParametersInLanes = 4096;

template <typename value_t>
bool pays_in_lanes(const OpArguments& args) {
  constexpr int64_t kLanes = CpuKind<value_t, true>::kLanes;
  const int64_t threads = thread_count();
  const int64_t groups = ceil_div(args.tasks, kLanes);
  return !args.program.has_images &&
         args.program.parameters + args.program.frozen <= kMostParametersInLanes &&
         ceil_div(groups, threads) * kGroupCost < ceil_div(args.tasks, threads);
}

template <typename value_t>
void add_sums(const value_t* source, int64_t count, void* target) {
  using Vec = at::vec::Vectorized<value_t>;
  auto* sum = static_cast<value_t*>(target);
  at::vec::map2<value_t>([](Vec a, Vec b) { return a + b; }, sum, sum, source, count);
}

template <typename value_t, bool in_lanes>
void run_workers(const OpArguments& args) {
  using Worker = CpuWorker<value_t, in_lanes>;
  const int64_t groups = ceil_div(args.tasks, Worker::kLanes);
  const int64_t threads = thread_count();
  const int64_t workers = groups < threads ? 1 : threads;
  const bool shares_threads = workers < threads;
  const int64_t bytes = ceil_div(Worker::bytes(args, shares_threads), 64) * 64;
  const auto memory = workspace(bytes * workers);
  auto* base = static_cast<char*>(memory.mutable_data_ptr());
  std::vector<const value_t*> sums_theta(workers), sums_lr(workers);
  parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    const FlushDenormals flush;
    for (int64_t w = begin; w < end; ++w) {
      Worker worker(args, base + w * bytes, shares_threads);
      for (int64_t g = w * groups / workers; g < (w + 1) * groups / workers; ++g) {
        const int64_t first = g * Worker::kLanes;
        worker.run(first, std::min(Worker::kLanes, args.tasks - first));
      }
      sums_theta[w] = worker.sum_theta();
      sums_lr[w] = worker.sum_lr();
    }
  });
  for (int64_t w = 0; w < workers; ++w) {
    if (sums_theta[w] != nullptr) add_sums(sums_theta[w], args.program.parameters, args.grad_theta);
    if (sums_lr[w] != nullptr) add_sums(sums_lr[w], args.lr_elements(), args.grad_lr);
  }
}

template <typename value_t>
void run_with_threads(const OpArguments& args) {
  if (pays_in_lanes<value_t>(args)) {
    run_workers<value_t, true>(args);
  } else {
    run_workers<value_t, false>(args);
  }
}

}  // namespace fastmeta
