// Kernels that test the emulator. Of the first ones each rotates the numbers of a warp by a lane,
// out[i] = in[the next lane's i], and has a version with one bug planted.
#include <string_view>

#include "common/cuda/launch.cuh"
#include "common/cuda/reduce.cuh"

namespace fastmeta {
namespace {

constexpr int kThreads = 64;
constexpr int kBlocks = 2;

__device__ int next_of(int thread) { return thread / kWarp * kWarp + (thread + 1) % kWarp; }
__device__ int global(int thread) { return blockIdx.x * kThreads + thread; }

template <bool bug>
__global__ void barrier_removed(const float* in, float* out) {
  __shared__ float tile[kThreads];
  const int i = threadIdx.x;
  tile[i] = 0;
  __syncthreads();
  tile[i] = in[global(i)];
  if (!bug) __syncthreads();
  out[global(i)] = tile[next_of(i)];
}

template <bool bug>
__global__ void second_barrier_removed(const float* in, float* out) {
  __shared__ float tile[kThreads];
  const int i = threadIdx.x;
  for (int round = 0; round < 2; ++round) {
    tile[i] = in[global(i)] + static_cast<float>(round);
    __syncthreads();
    out[global(i)] = tile[next_of(i)] - static_cast<float>(round);
    if (!bug) __syncthreads();
  }
}

template <bool bug>
__global__ void warp_barrier_removed(const float* in, float* out) {
  __shared__ float tile[kThreads];
  const int i = threadIdx.x;
  tile[i] = 0;
  __syncthreads();
  tile[i] = in[global(i)];
  if (!bug) __syncwarp();
  out[global(i)] = tile[next_of(i)];
}

template <bool bug>
__global__ void initialisation_skipped(const float* in, float* out) {
  __shared__ float tile[kThreads];
  const int i = threadIdx.x;
  if (!bug || i != 7) tile[i] = in[global(i)];
  __syncthreads();
  out[global(i)] = tile[next_of(i)];
}

// The array is a pointer where it is read: its type no longer says where it ends.
__device__ float read_next(const float* tile, int i, int extra) {
  return tile[i == kThreads - 1 ? i + extra : next_of(i)];
}

template <bool bug>
__global__ void past_end_of_shared(const float* in, float* out) {
  __shared__ float tile[kThreads];
  const int i = threadIdx.x;
  tile[i] = in[global(i)];
  __syncthreads();
  out[global(i)] = read_next(tile, i, bug ? 1 : 1 - kWarp);
}

template <bool bug>
__global__ void past_end_of_dynamic_shared(const float* in, float* out) {
  auto* tile = dynamic_shared<float>();
  const int i = threadIdx.x;
  tile[i] = in[global(i)];
  __syncthreads();
  out[global(i)] = read_next(tile, i, bug ? 1 : 1 - kWarp);
}

template <bool bug>
__global__ void read_past_end_of_global(const float* in, float* out) {
  const int i = global(threadIdx.x);
  out[i] = in[bug ? i + 1 : next_of(i)];
}

template <bool bug>
__global__ void write_past_end_of_global(const float* in, float* out) {
  const int i = global(threadIdx.x);
  out[i] = in[next_of(i)];
  if (bug && i == kBlocks * kThreads - 1) out[i + 1] = 0;
}

template <bool bug>
__global__ void two_writers(const float* in, float* out) {
  __shared__ float first;
  const int i = threadIdx.x;
  if (i == 0 || (bug && i == kWarp)) first = in[global(0)];
  __syncthreads();
  out[global(i)] = i == kWarp - 1 ? first : in[global(next_of(i))];
}

template <bool bug>
__global__ void sum_not_atomic(const float* in, float* out) {
  __shared__ int count;
  const int i = threadIdx.x;
  if (i == 0) count = 0;
  __syncthreads();
  if (bug) {
    count += 1;
  } else {
    atomicAdd(&count, 1);
  }
  __syncthreads();
  out[global(i)] = count == kThreads ? in[global(next_of(i))] : -1;
}

template <bool bug>
__global__ void barrier_after_exit(const float* in, float* out) {
  __shared__ float tile[kThreads];
  const int i = threadIdx.x;
  tile[i] = in[global(i)];
  if (bug && i == kThreads - 1) return;
  __syncthreads();
  out[global(i)] = tile[next_of(i)];
}

template <bool bug>
__global__ void barriers_in_branches(const float* in, float* out) {
  __shared__ float tile[kThreads];
  const int i = threadIdx.x;
  tile[i] = in[global(i)];
  if (bug && i < kWarp) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[global(i)] = tile[next_of(i)];
}

template <bool bug>
__global__ void mask_names_exited_lane(const float* in, float* out) {
  const int i = threadIdx.x;
  const float value = in[global(i)];
  if (bug && i == kThreads - 1) return;
  out[global(i)] = __shfl_sync(kAllLanes, value, next_of(i));
}

template <bool bug>
__global__ void mask_without_own_lane(const float* in, float* out) {
  const int i = threadIdx.x;
  out[global(i)] = __shfl_sync(bug ? kAllLanes << 1 : kAllLanes, in[global(i)], next_of(i));
}

template <bool bug>
__global__ void source_outside_mask(const float* in, float* out) {
  const int i = threadIdx.x;
  const float value = in[global(i)];
  if (bug) {
    const unsigned half = i % kWarp < kWarp / 2 ? 0xffffU : 0xffff0000U;
    out[global(i)] = __shfl_sync(half, value, next_of(i));
  } else {
    out[global(i)] = __shfl_sync(kAllLanes, value, next_of(i));
  }
}

template <bool bug>
__global__ void lanes_apart(const float* in, float* out) {
  const int i = threadIdx.x;
  const float value = in[global(i)];
  if (bug && i % kWarp == 3) __ballot_sync(kAllLanes, true);
  out[global(i)] = __shfl_sync(kAllLanes, value, next_of(i));
}

// These abort: UndefinedBehaviorSanitizer stops the process.

template <bool bug>
__global__ void index_past_end_of_array(const float* in, float* out) {
  __shared__ float tile[kThreads];
  const int i = threadIdx.x;
  tile[i] = in[global(i)];
  __syncthreads();
  out[global(i)] = tile[bug ? i + 1 : next_of(i)];
}

struct alignas(8) Pair {
  float value[2];
};

template <bool bug>
__global__ void misaligned(const float* in, float* out) {
  const int i = global(threadIdx.x);
  const bool is_last = i == kBlocks * kThreads - 1;
  const auto* pairs = reinterpret_cast<const Pair*>(bug && !is_last ? in + 1 : in);
  out[i] = is_last ? in[next_of(i)] : pairs[0].value[0] * 0 + in[next_of(i)];
}

// What warp operations give, beside what they should: 16 numbers a lane.
template <bool bug>
__global__ void warp_operations(const float* in, float* out) {
  static_assert(!bug);
  const int lane = threadIdx.x % kWarp;
  const float value = in[lane];
  float* row = out + threadIdx.x * 16;
  row[0] = __shfl_up_sync(kAllLanes, value, 3);
  row[1] = __shfl_down_sync(kAllLanes, value, 3);
  row[2] = __shfl_xor_sync(kAllLanes, value, 5);
  row[3] = __shfl_up_sync(kAllLanes, value, 3, 8);
  row[4] = __shfl_down_sync(kAllLanes, value, 3, 8);
  row[5] = __shfl_sync(kAllLanes, value, 11, 8);
  row[6] = __popc(__ballot_sync(kAllLanes, lane > 20));
  row[7] = __any_sync(kAllLanes, lane == 5);
  row[8] = __all_sync(kAllLanes, lane == 5);
  row[9] = __reduce_add_sync(kAllLanes, static_cast<unsigned>(lane));
  row[10] = __reduce_max_sync(kAllLanes, lane);
  row[11] = __reduce_min_sync(kAllLanes, lane);
  row[12] = __popc(__match_any_sync(kAllLanes, lane / 4));
  const unsigned odd = lane % 2 ? 0xaaaaaaaaU : 0x55555555U;
  row[13] = __shfl_sync(odd, value, lane % 2 ? 31 : 0);
  row[14] = warp_sum(value);
  row[15] = __ffs(static_cast<int>(__reduce_xor_sync(kAllLanes, 1U << lane)));
}

// What barriers that count give, and which thread of which block this is: 6 numbers a thread.
template <bool bug>
__global__ void block_operations(const float*, float* out) {
  static_assert(!bug);
  const int i = threadIdx.x;
  float* row = out + global(i) * 6;
  row[0] = static_cast<float>(__syncthreads_count(i < 10));
  row[1] = static_cast<float>(__syncthreads_or(i == 10));
  row[2] = static_cast<float>(__syncthreads_and(i != 10));
  row[3] = static_cast<float>(__syncthreads_and(1));
  row[4] = static_cast<float>(blockDim.x * gridDim.x);
  row[5] = block_sum<kThreads>(static_cast<float>(i));
}

// What atomics leave in shared memory when all threads of a block take part: 9 numbers a thread.
template <bool bug>
__global__ void atomic_operations(const float*, float* out) {
  static_assert(!bug);
  constexpr int kFirst[] = {0, 0, 99, 99, -99, -1, 0, 0, 0};
  __shared__ int values[9];
  const int i = threadIdx.x;
  if (i < 9) values[i] = kFirst[i];
  __syncthreads();
  atomicAdd(&values[0], i);
  atomicSub(&values[1], i);
  atomicExch(&values[2], 7);
  atomicMin(&values[3], i - 5);
  atomicMax(&values[4], i);
  atomicAnd(&values[5], ~(i & 12));
  atomicOr(&values[6], i);
  atomicXor(&values[7], 1 << i % 5);
  atomicCAS(&values[8], 0, 3);
  __syncthreads();
  for (int k = 0; k < 9; ++k) out[global(i) * 9 + k] = static_cast<float>(values[k]);
}

using Kernel = void (*)(const float*, float*);

struct Entry {
  std::string_view name;
  Kernel right, wrong;
};

#define ENTRY(kernel) {#kernel, kernel<false>, kernel<true>}
constexpr Entry kEntries[] = {
    ENTRY(barrier_removed),
    ENTRY(second_barrier_removed),
    ENTRY(warp_barrier_removed),
    ENTRY(initialisation_skipped),
    ENTRY(past_end_of_shared),
    ENTRY(past_end_of_dynamic_shared),
    ENTRY(read_past_end_of_global),
    ENTRY(write_past_end_of_global),
    ENTRY(two_writers),
    ENTRY(sum_not_atomic),
    ENTRY(barrier_after_exit),
    ENTRY(barriers_in_branches),
    ENTRY(mask_names_exited_lane),
    ENTRY(mask_without_own_lane),
    ENTRY(source_outside_mask),
    ENTRY(lanes_apart),
    ENTRY(index_past_end_of_array),
    ENTRY(misaligned),
    {"warp_operations", warp_operations<false>, nullptr},
    {"block_operations", block_operations<false>, nullptr},
    {"atomic_operations", atomic_operations<false>, nullptr},
};
#undef ENTRY

}  // namespace
}  // namespace fastmeta

// Runs kernel `name` on two blocks of 64 threads. Returns a cudaError_t; -1 for an unknown name.
extern "C" int run_kernel(const char* name, bool bug, const float* in, float* out) {
  for (const auto& entry : fastmeta::kEntries) {
    if (entry.name != name) continue;
    return fastmeta::launch(bug ? entry.wrong : entry.right, fastmeta::kBlocks, fastmeta::kThreads,
                            fastmeta::kThreads * sizeof(float), nullptr, in, out);
  }
  return -1;
}
