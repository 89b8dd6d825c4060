// A job on the CPU: threads take tasks, or groups of as many tasks as a vector has lanes.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>

#include <algorithm>
#include <vector>

#include "common/ceil_div.h"
#include "common/cpu/denormals.h"
#include "common/cpu/kept_memory.h"
#include "task_program/cpu/worker.h"

namespace fastmeta {

// A group of tasks in lanes takes about as long as this many tasks one after the other.
inline constexpr int64_t kGroupCost = 5;
// Parameters of a task up to which a group's arrays stay in the L2 cache.
inline constexpr int64_t kMostParametersInLanes = 4096;

template <typename value_t>
bool pays_in_lanes(const Job& job) {
  constexpr int64_t kLanes = CpuKind<value_t, true>::kLanes;
  const int64_t threads = at::get_num_threads();
  const int64_t groups = ceil_div(job.tasks, kLanes);
  return !job.program.has_images &&
         job.program.parameters + job.program.frozen <= kMostParametersInLanes &&
         ceil_div(groups, threads) * kGroupCost < ceil_div(job.tasks, threads);
}

template <typename value_t>
void add_sums(const value_t* source, int64_t count, void* target) {
  using Vec = at::vec::Vectorized<value_t>;
  auto* sum = static_cast<value_t*>(target);
  at::vec::map2<value_t>([](Vec a, Vec b) { return a + b; }, sum, sum, source, count);
}

template <typename value_t, bool in_lanes>
void run_workers(const Job& job) {
  using Worker = CpuWorker<value_t, in_lanes>;
  const int64_t groups = ceil_div(job.tasks, Worker::kLanes);
  const int64_t threads = at::get_num_threads();
  const int64_t workers = groups < threads ? 1 : threads;
  const bool shares_threads = workers < threads;
  const int64_t bytes = ceil_div(Worker::bytes(job, shares_threads), 64) * 64;
  const auto memory = kept_memory(bytes * workers);
  auto* base = static_cast<char*>(memory.mutable_data_ptr());
  std::vector<const value_t*> sums_theta(workers), sums_lr(workers);
  at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    const FlushDenormals flush;
    for (int64_t w = begin; w < end; ++w) {
      Worker worker(job, base + w * bytes, shares_threads);
      for (int64_t g = w * groups / workers; g < (w + 1) * groups / workers; ++g) {
        const int64_t first = g * Worker::kLanes;
        worker.run(first, std::min(Worker::kLanes, job.tasks - first));
      }
      sums_theta[w] = worker.sum_theta();
      sums_lr[w] = worker.sum_lr();
    }
  });
  for (int64_t w = 0; w < workers; ++w) {
    if (sums_theta[w] != nullptr) add_sums(sums_theta[w], job.program.parameters, job.grad_theta);
    if (sums_lr[w] != nullptr) add_sums(sums_lr[w], job.lr_elements(), job.grad_lr);
  }
}

template <typename value_t>
void run_with_threads(const Job& job) {
  if (pays_in_lanes<value_t>(job)) {
    run_workers<value_t, true>(job);
  } else {
    run_workers<value_t, false>(job);
  }
}

}  // namespace fastmeta
