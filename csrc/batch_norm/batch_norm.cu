#include "batch_norm/batch_norm.h"
#include "common/cuda/launch.cuh"
#include "common/cuda/reduce.cuh"
#include "common/cuda/scalar.cuh"

namespace fastmeta {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// Numbers of one channel of one task, see batch_norm.h. A block owns the channel, a thread every
// 256th number.
// Sums run over a thread's numbers, then the lanes of a warp, then the warps, in value_t. Each pass
// reads the numbers again: a channel's few hundred KiB stay in the L2 cache.
template <typename value_t>
class BlockChannel {
 public:
  __device__ BlockChannel(const BatchNormShape& shape, const void* x, double eps)
      : shape_(shape),
        begin_(shape.begin(blockIdx.x)),
        first_{threadIdx.x / shape.positions, threadIdx.x % shape.positions},
        step_{kThreads / shape.positions, kThreads % shape.positions},
        share_(1 / count()),
        x_(static_cast<const value_t*>(x)),
        xh_(normaliser(static_cast<value_t>(eps))) {}

  __device__ value_t count() const { return static_cast<value_t>(shape_.count()); }
  __device__ value_t rstd() const { return xh_.rstd; }
  __device__ value_t xh(int64_t place) const { return xh_(x_[place]); }

  // Calls f(place) for each number of this thread.
  template <typename F>
  __device__ void each(const F& f) const {
    for (Place at = first_; at.image < shape_.images;) {
      f(begin_ + at.image * shape_.image_stride() + at.position);
      // Carries by hand: no division in the loop.
      at.image += step_.image;
      at.position += step_.position;
      if (at.position >= shape_.positions) {
        at.position -= shape_.positions;
        ++at.image;
      }
    }
  }

  // Computes means[k], the mean of what add(place, sums) adds to sums[k]. Every thread gets them.
  // Each caller's `add` has its own type, so `parts` is its own too, and nobody still reads it.
  template <int kCount, typename Add>
  __device__ void means(value_t (&means)[kCount], const Add& add) const {
    __shared__ value_t parts[kCount][kWarps];
    value_t sums[kCount] = {};
    each([&](int64_t place) { add(place, sums); });
    for (int k = 0; k < kCount; ++k) {
      const value_t sum = warp_sum(sums[k]);
      if (threadIdx.x % kWarp == 0) parts[k][threadIdx.x / kWarp] = sum;
    }
    __syncthreads();
    for (int k = 0; k < kCount; ++k) {
      means[k] = 0;
      for (int warp = 0; warp < kWarps; ++warp) means[k] += parts[k][warp];
      means[k] *= share_;
    }
  }

 private:
  __device__ Normaliser<value_t> normaliser(value_t eps) const {
    value_t mean[1], variance[1];
    means(mean, [&](int64_t place, value_t* sum) { sum[0] += x_[place]; });
    means(variance, [&](int64_t place, value_t* sum) {
      const value_t distance = x_[place] - mean[0];
      sum[0] += distance * distance;
    });
    return {mean[0], variance[0], eps};
  }

  struct Place {
    int64_t image, position;
  };

  const BatchNormShape& shape_;
  int64_t begin_;
  Place first_,
      step_;       // a thread's step; a division in the loop is a call that spills
  value_t share_;  // weight of one number in a mean
  const value_t* x_;
  Normaliser<value_t> xh_;
};

template <typename value_t>
__device__ const value_t* numbers(const void* array) {
  return static_cast<const value_t*>(array);
}
template <typename value_t>
__device__ value_t* numbers(void* array) {
  return static_cast<value_t*>(array);
}

template <typename value_t>
__device__ void run_channel(const BlockChannel<value_t>& channel, const BatchNormForward& pass) {
  const value_t weight = numbers<value_t>(pass.weight)[blockIdx.x];
  const value_t bias = numbers<value_t>(pass.bias)[blockIdx.x];
  auto* y = numbers<value_t>(pass.y);
  channel.each([&](int64_t place) { y[place] = weight * channel.xh(place) + bias; });
}

template <typename value_t>
__device__ void run_channel(const BlockChannel<value_t>& channel, const BatchNormBackward& pass) {
  const auto* g = numbers<value_t>(pass.g);
  value_t means[2];
  channel.means(means, [&](int64_t place, value_t* sums) {
    sums[0] += g[place];
    sums[1] += g[place] * channel.xh(place);
  });
  const value_t weight = numbers<value_t>(pass.weight)[blockIdx.x];
  const Centred<value_t> of_g{weight * channel.rstd(), means[0], means[1]};
  auto* grad_x = numbers<value_t>(pass.grad_x);
  channel.each([&](int64_t place) { grad_x[place] = of_g(g[place], channel.xh(place)); });
  if (threadIdx.x != 0) return;
  numbers<value_t>(pass.grad_bias)[blockIdx.x] = means[0] * channel.count();
  numbers<value_t>(pass.grad_weight)[blockIdx.x] = means[1] * channel.count();
}

template <typename value_t>
__device__ void run_channel(const BlockChannel<value_t>& channel, const BatchNormSecond& pass) {
  const auto *v = numbers<value_t>(pass.v), *g = numbers<value_t>(pass.g);
  value_t means[5];
  channel.means(means, [&](int64_t place, value_t* sums) {
    const value_t xh = channel.xh(place);
    sums[0] += v[place];
    sums[1] += g[place];
    sums[2] += v[place] * xh;
    sums[3] += g[place] * xh;
    sums[4] += v[place] * g[place];
  });
  const auto number = [](const void* rows) { return numbers<value_t>(rows)[blockIdx.x]; };
  const SecondGradient<value_t> second(means, number(pass.weight), channel.rstd(), number(pass.w),
                                       number(pass.b), channel.count());
  auto *grad_g = numbers<value_t>(pass.grad_g), *grad_x = numbers<value_t>(pass.grad_x);
  channel.each([&](int64_t place) {
    const value_t xh = channel.xh(place);
    grad_g[place] = second.grad_g(v[place], xh);
    grad_x[place] = second.grad_x(v[place], g[place], xh);
  });
  if (threadIdx.x == 0) numbers<value_t>(pass.grad_weight)[blockIdx.x] = second.grad_weight;
}

template <typename value_t, typename Pass>
__global__ void __launch_bounds__(kThreads)
    batch_norm_kernel(BatchNormShape shape, double eps, Pass pass) {
  run_channel(BlockChannel<value_t>(shape, pass.x, eps), pass);
}

template <typename Pass>
int launch_pass(Dtype dtype, const BatchNormShape& shape, double eps, const Pass& pass,
                void* stream) {
  auto* kernel =
      dtype == Dtype::kDouble ? batch_norm_kernel<double, Pass> : batch_norm_kernel<float, Pass>;
  return launch(kernel, shape.all_channels(), kThreads, 0, static_cast<cudaStream_t>(stream), shape,
                eps, pass);
}

}  // namespace

int launch_batch_norm(Dtype dtype, const BatchNormShape& shape, double eps,
                      const BatchNormForward& pass, void* stream) {
  return launch_pass(dtype, shape, eps, pass, stream);
}
int launch_batch_norm(Dtype dtype, const BatchNormShape& shape, double eps,
                      const BatchNormBackward& pass, void* stream) {
  return launch_pass(dtype, shape, eps, pass, stream);
}
int launch_batch_norm(Dtype dtype, const BatchNormShape& shape, double eps,
                      const BatchNormSecond& pass, void* stream) {
  return launch_pass(dtype, shape, eps, pass, stream);
}

}  // namespace fastmeta
