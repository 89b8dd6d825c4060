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

// Fewest tasks of a group; with its set-up, a task by itself takes longer than a group's share.
inline constexpr int64_t kFewestInLanes = 3;

// How tasks are shared out: in groups, and the rest one after the other, if it is too small for a
// group. The first worker, which has the fewest groups, takes the rest.
struct Shares {
  int64_t groups, rest, workers;

  Shares(int64_t tasks, int64_t lanes) : rest(tasks % lanes < kFewestInLanes ? tasks % lanes : 0) {
    groups = ceil_div(tasks - rest, lanes);
    workers = groups < thread_count() ? 1 : thread_count();
  }
  // Time of the slowest worker, in tasks taken one after the other.
  int64_t cost() const {
    return std::max(ceil_div(groups, workers) * kGroupCost, groups / workers * kGroupCost + rest);
  }
};

template <typename value_t>
bool pays_in_lanes(const OpArguments& args) {
  const Shares shares(args.tasks, CpuKind<value_t, true>::kLanes);
  return !args.program.has_images &&
         args.program.parameters + args.program.frozen <= kMostParametersInLanes &&
         shares.cost() < ceil_div(args.tasks, thread_count());
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
  using Single = CpuWorker<value_t, false>;
  const Shares shares(args.tasks, Worker::kLanes);
  const int64_t groups = shares.groups, workers = shares.workers;
  const bool shares_threads = workers < thread_count();
  const int64_t bytes = ceil_div(Worker::bytes(args, shares_threads), 64) * 64;
  const int64_t of_rest = shares.rest > 0 ? Single::bytes(args, false) : 0;
  const auto memory = workspace(bytes * workers + of_rest);
  auto* base = static_cast<char*>(memory.mutable_data_ptr());
  // Of the workers, and of the rest, whose tasks are the last.
  std::vector<const value_t*> sums_theta(workers + 1), sums_lr(workers + 1);
  const auto run = [&](auto& worker, int64_t first_task, int64_t count, int64_t place) {
    constexpr int64_t kLanes = std::decay_t<decltype(worker)>::kLanes;
    for (int64_t n = 0; n < count; n += kLanes) {
      worker.run(first_task + n, std::min(kLanes, count - n));
    }
    sums_theta[place] = worker.sum_theta();
    sums_lr[place] = worker.sum_lr();
  };
  parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    const FlushDenormals flush;
    for (int64_t w = begin; w < end; ++w) {
      Worker worker(args, base + w * bytes, shares_threads);
      const int64_t first = w * groups / workers * Worker::kLanes;
      const int64_t last = (w + 1) * groups / workers * Worker::kLanes;
      run(worker, first, std::min(last, args.tasks - shares.rest) - first, w);
      if (w > 0 || shares.rest == 0) continue;
      Single single(args, base + workers * bytes, false);
      run(single, args.tasks - shares.rest, shares.rest, workers);
    }
  });
  for (int64_t w = 0; w <= workers; ++w) {
    if (sums_theta[w] != nullptr) add_sums(sums_theta[w], args.program.parameters, args.grad_theta);
    if (sums_lr[w] != nullptr) add_sums(sums_lr[w], args.lr_elements(), args.grad_lr);
  }
}

// Threads for the vectors of each task: more than one if tasks are fewer than threads, and vectors
// so many that each thread does better to compute by itself what they share.
inline int64_t threads_of_vectors(const OpArguments& args) {
  const int64_t threads = ceil_div(thread_count(), args.tasks);
  return args.vectors >= 2 * threads ? threads : 1;
}

// The call with only task t, and of its vectors the `part`-th of so many parts.
template <typename value_t>
OpArguments vectors_of_task(const OpArguments& args, int64_t t, int64_t part, int64_t parts) {
  const auto moved = [](const void* data, int64_t elements, auto size) -> const void* {
    if (data == nullptr) return nullptr;
    return static_cast<const char*>(data) + elements * static_cast<int64_t>(size);
  };
  const int64_t first = part * args.vectors / parts;
  const int64_t given = t * args.given_elements() + first * args.program.adapted;
  const int64_t gradient = t * args.gradient_elements() + first * args.program.parameters;
  OpArguments own = args;
  own.tasks = 1;
  own.vectors = (part + 1) * args.vectors / parts - first;
  own.theta = moved(args.theta, t * args.theta_stride, sizeof(value_t));
  own.support.x = moved(args.support.x, t * args.support.x_stride, sizeof(value_t));
  own.support.targets = moved(args.support.targets, t * args.support.targets_stride,
                              args.has_labels() ? sizeof(int64_t) : sizeof(value_t));
  own.support.weight = moved(args.support.weight, t * args.support.weight_stride, sizeof(value_t));
  own.given = moved(args.given, given, sizeof(value_t));
  own.grad_theta = static_cast<value_t*>(args.grad_theta) + gradient;
  return own;
}

template <typename value_t>
void run_vectors_apart(const OpArguments& args, int64_t parts) {
  using Worker = CpuWorker<value_t, false>;
  const int64_t jobs = args.tasks * parts, workers = std::min(jobs, thread_count());
  const int64_t bytes = ceil_div(Worker::bytes(args, false), 64) * 64;
  const auto memory = workspace(bytes * workers);
  auto* base = static_cast<char*>(memory.mutable_data_ptr());
  parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    const FlushDenormals flush;
    for (int64_t w = begin; w < end; ++w) {
      for (int64_t job = w * jobs / workers; job < (w + 1) * jobs / workers; ++job) {
        const auto own = vectors_of_task<value_t>(args, job / parts, job % parts, parts);
        Worker(own, base + w * bytes, false).run(0, 1);
      }
    }
  });
}

template <typename value_t>
void run_with_threads(const OpArguments& args) {
  const int64_t parts = args.kind == OpKind::kHvp ? threads_of_vectors(args) : 1;
  if (parts > 1) {
    run_vectors_apart<value_t>(args, parts);
  } else if (pays_in_lanes<value_t>(args)) {
    run_workers<value_t, true>(args);
  } else {
    run_workers<value_t, false>(args);
  }
}

}  // namespace fastmeta
