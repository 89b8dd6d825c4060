#include "common/cuda/label_range.h"
#include "common/cuda/launch.cuh"

namespace fastmeta {
namespace {

constexpr int kThreads = 256;

// bad[b] = any label of part b is outside lowest <= label < classes. Part b is every gridDim-th run of
// kThreads labels, beginning with run b. One flag a part needs neither atomics nor a memset before.
__global__ void __launch_bounds__(kThreads)
    label_range_kernel(const int64_t* labels, int64_t count, int64_t lowest, int64_t classes,
                       int* bad) {
  int found = 0;
  const int64_t step = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += step) {
    found |= labels[i] < lowest || labels[i] >= classes;
  }
  found = __syncthreads_or(found);
  if (threadIdx.x == 0) bad[blockIdx.x] = found;
}

}  // namespace

int launch_label_range(const int64_t* labels, int64_t count, int64_t lowest, int64_t classes,
                       int* bad, void* stream) {
  return launch(label_range_kernel, kLabelRangeParts, kThreads, 0,
                static_cast<cudaStream_t>(stream), labels, count, lowest, classes, bad);
}

}  // namespace fastmeta
