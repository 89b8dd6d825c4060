// Kernel that takes a block through the steps of a call, with each task's numbers in shared memory.
#pragma once

#include "execution/cuda/warp_thread_group.cuh"
#include "task_program/cuda/block_product.cuh"

namespace fastmeta {

inline constexpr int kMostBlockThreads = 512;

template <typename value_t>
__device__ value_t& shared_number(const Array<InShared<value_t>>& a, int64_t i) {
  // 32-bit offsets: addresses in shared memory take no 64-bit arithmetic.
  return dynamic_shared<value_t>()[a.offset + static_cast<int>(i)];
}

template <typename value_t>
struct SharedAccessor {
  using number_t = value_t;
  int index;

  __device__ value_t load(const Array<InShared<value_t>>& a, int64_t offset = 0) const {
    return shared_number(a, offset + index);
  }
  __device__ void store(const Array<InShared<value_t>>& a, value_t value,
                        int64_t offset = 0) const {
    shared_number(a, offset + index) = value;
  }
  __device__ value_t load_one(const Array<InShared<value_t>>& a, int64_t i) const {
    return shared_number(a, i);
  }
};

template <typename value_t>
struct SharedThreadGroup : WarpThreadGroup<value_t> {
  __device__ value_t load(const Array<InShared<value_t>>& a, int64_t i) const {
    return shared_number(a, i);
  }
  __device__ void store(const Array<InShared<value_t>>& a, int64_t i, value_t value) const {
    shared_number(a, i) = value;
  }
};

// Numbers of a task outside and inside of shared memory: `count`, in rows of `row`.
struct Transfer {
  void* outside;
  int64_t task_stride, row, row_stride;
  int count, inside;

  template <typename number_t>
  __device__ number_t* place(int64_t task, int i) const {
    return static_cast<number_t*>(outside) + task * task_stride + i / row * row_stride + i % row;
  }
};

// Transfers in: two more where weights of examples come with a long list of steps, see BlockRun.
inline constexpr int kMostTransfers = 8, kMostWithWeights = kMostTransfers + 2;

template <typename value_t, int bytes>
struct BlockArguments {
  static constexpr bool kHasWeights = bytes > 4096;
  Transfer in[kHasWeights ? kMostWithWeights : kMostTransfers], out[kMostTransfers];
  int ins, outs;
  int first_labels;  // transfers from here on are of int64 labels
  int64_t ignored;   // a label that becomes kIgnoredLabel
  StepList<bytes> steps;
};

template <typename value_t, int bytes>
__device__ void load_task(const BlockArguments<value_t, bytes>& j) {
  auto* numbers = dynamic_shared<value_t>();
  const int64_t task = blockIdx.x;
  int total = 0;
  for (int t = 0; t < j.ins; ++t) total += j.in[t].count;
  // Runs all transfers as one range, so that small ones are under way together.
#pragma unroll 4
  for (int i = threadIdx.x; i < total; i += blockDim.x) {
    int t = 0, at = i;
    // At most kMostWithWeights steps: a search would cost more.
    for (; at >= j.in[t].count; ++t) at -= j.in[t].count;
    value_t number;
    if (t < j.first_labels) {
      number = *j.in[t].template place<const value_t>(task, at);
    } else {
      const int64_t label = *j.in[t].template place<const int64_t>(task, at);
      // Labels become numbers, so that all arrays of a task have one type.
      number = static_cast<value_t>(label == j.ignored ? kIgnoredLabel : label);
    }
    numbers[j.in[t].inside + at] = number;
  }
}

template <typename value_t, int bytes>
__device__ void store_task(const BlockArguments<value_t, bytes>& j) {
  const auto* numbers = dynamic_shared<value_t>();
  for (int t = 0; t < j.outs; ++t) {
    for (int i = threadIdx.x; i < j.out[t].count; i += blockDim.x) {
      *j.out[t].template place<value_t>(blockIdx.x, i) = numbers[j.out[t].inside + i];
    }
  }
}

// Runs f on elements; product: the one whose elements this thread takes, or null.
template <typename value_t, typename F>
__device__ void map_step(const F& f, int n, const BlockProduct* product) {
  if (product != nullptr) {
    for_own_elements(*product, [&](int i) { f(SharedAccessor<value_t>{i}); });
    return;
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += blockDim.x) f(SharedAccessor<value_t>{i});
}

template <typename value_t, typename F>
__device__ void row_step(const F& f, int n) {
  const SharedThreadGroup<value_t> group{{static_cast<int>(threadIdx.x) % kWarp}};
#pragma unroll 1
  for (int row = threadIdx.x / kWarp; row < n; row += blockDim.x / kWarp) f(group, row);
}

// Sums by the first warp only: sums are of few numbers, or rare.
template <typename value_t, typename Step>
__device__ void sum_step(const Step& step, int n) {
  if (threadIdx.x >= kWarp) return;
  value_t sum = 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += kWarp) sum += step.f(SharedAccessor<value_t>{i});
  sum = warp_sum(sum);
  if (threadIdx.x == 0) shared_number(step.target, 0) += sum;
}

// Calls run(step) with the step, whose kind is `kind`, at `data`.
template <typename... Kinds, typename Run>
__device__ void with_step(StepKinds<Kinds...>, int kind, const char* data, const Run& run) {
  int i = 0;
  ((kind == i++ ? run(*reinterpret_cast<const Kinds*>(data)) : void()), ...);
}

template <typename value_t>
__device__ void run_step(const StepHead& head, const char* data, const BlockProduct* product) {
  using Storage = InShared<value_t>;
  using Maps = MapKinds<Storage>;
  using Rows = RowKinds<Storage>;
  with_step(Maps{}, head.kind, data, [&](const auto& f) {
    map_step<value_t>(f, head.n, head.start == Start::kOwn ? product : nullptr);
  });
  with_step(Rows{}, head.kind - Maps::kCount, data,
            [&](const auto& f) { row_step<value_t>(f, head.n); });
  with_step(SumKinds<Storage>{}, head.kind - Maps::kCount - Rows::kCount, data,
            [&](const auto& f) { sum_step<value_t>(f, head.n); });
}

template <typename value_t, int bytes>
__global__ void __launch_bounds__(kMostBlockThreads)
    block_kernel(const __grid_constant__ BlockArguments<value_t, bytes> j) {
  load_task(j);
  const BlockProduct* product = nullptr;  // the last one
  for (int at = 0; at < j.steps.used;) {
    const auto& head = *reinterpret_cast<const StepHead*>(j.steps.data + at);
    const char* data = j.steps.data + at + sizeof(StepHead);
    if (head.start == Start::kWaits) {
      __syncthreads();
    }
    if (head.kind == StepHead::kProduct) {
      product = reinterpret_cast<const BlockProduct*>(data);
      block_product<value_t>(*product);
    } else {
      run_step<value_t>(head, data, product);
    }
    at += static_cast<int>(sizeof(StepHead)) + head.bytes;
  }
  __syncthreads();
  store_task(j);
}

}  // namespace fastmeta
