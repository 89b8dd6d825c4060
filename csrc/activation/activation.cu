#include "activation/activation.h"
#include "common/ceil_div.h"
#include "common/cuda/launch.cuh"

namespace fastmeta {
namespace {

constexpr int kThreads = 256;

struct NumberAt {
  int64_t place;

  template <typename value_t>
  __device__ value_t load(const value_t* array) const {
    return array[place];
  }
  template <typename value_t>
  __device__ void store(value_t* array, value_t number) const {
    array[place] = number;
  }
};

// A thread a number. The kind is the same for all threads, so they all choose alike.
template <typename Pass>
__global__ void __launch_bounds__(kThreads)
    activation_kernel(Activation f, int64_t count, Pass pass) {
  const int64_t place = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (place < count) pass(f, NumberAt{place});
}

}  // namespace

template <typename Pass>
int launch_activation(const Activation& f, int64_t count, const Pass& pass, void* stream) {
  return launch(activation_kernel<Pass>, ceil_div(count, kThreads), kThreads, 0,
                static_cast<cudaStream_t>(stream), f, count, pass);
}

#define FASTMETA_LAUNCH(Pass) \
  template int launch_activation(const Activation&, int64_t, const Pass&, void*);
FASTMETA_LAUNCH(ActivationValue<float>)
FASTMETA_LAUNCH(ActivationValue<double>)
FASTMETA_LAUNCH(ActivationGradient<float>)
FASTMETA_LAUNCH(ActivationGradient<double>)
FASTMETA_LAUNCH(ActivationSecond<float>)
FASTMETA_LAUNCH(ActivationSecond<double>)
#undef FASTMETA_LAUNCH

}  // namespace fastmeta
