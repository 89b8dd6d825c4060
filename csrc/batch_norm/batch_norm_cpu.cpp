// CPU implementation of batch norm. A thread takes channels; each stays in its cache from pass to
// pass.
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <array>

#include "batch_norm/batch_norm_ops.h"
#include "common/cpu/parallel.h"

namespace fastmeta {
namespace {

// Numbers of one channel of one task, in vectors: runs of P, the last vector of a run in part.
template <typename value_t>
class Channel {
 public:
  using Vec = at::vec::Vectorized<value_t>;

  Channel(const BatchNormShape& shape, int64_t index, const void* x, double eps)
      : shape_(shape), begin_(shape.begin(index)), x_(numbers(x)), xh_(normaliser(eps)) {}

  double count() const { return static_cast<double>(shape_.count()); }
  const Normaliser<double>& xh() const { return xh_; }
  Vec xh(int64_t place, int count) const { return xh_(Vec::loadu(x_ + place, count)); }

  // Calls f(place, count) for each vector: the offset of its numbers, and their count.
  template <typename F>
  void each(const F& f) const {
    for (int64_t image = 0; image < shape_.images; ++image) {
      const int64_t run = begin_ + image * shape_.image_stride();
      for (int64_t i = 0; i < shape_.positions; i += Vec::size()) {
        f(run + i, static_cast<int>(std::min<int64_t>(Vec::size(), shape_.positions - i)));
      }
    }
  }

  // Computes means[k], the mean over numbers of terms(place, count)[k]. A vector's lanes each sum
  // few of many numbers; the lanes are summed in double.
  template <size_t kCount, typename Terms>
  void means(double (&means)[kCount], const Terms& terms) const {
    // Short float sums lose few digits; double takes over every 128 vectors.
    constexpr int kMostInLane = 128;
    std::array<Vec, kCount> lanes;
    lanes.fill(Vec(0));
    std::fill_n(means, kCount, 0.0);
    int in_lane = 0;
    const auto add_up = [&] {
      for (size_t k = 0; k < kCount; ++k) {
        value_t part[Vec::size()];
        lanes[k].store(part);
        for (const value_t number : part) means[k] += number;
        lanes[k] = Vec(0);
      }
      in_lane = 0;
    };
    each([&](int64_t place, int count) {
      const auto numbers = terms(place, count);
      for (size_t k = 0; k < kCount; ++k) {
        lanes[k] =
            // The lanes past a run's end have garbage.
            lanes[k] + (count == Vec::size() ? numbers[k] : Vec::set(Vec(0), numbers[k], count));
      }
      if (++in_lane == kMostInLane) add_up();
    });
    add_up();
    for (double& mean : means) mean /= static_cast<double>(shape_.count());
  }

  static const value_t* numbers(const void* array) { return static_cast<const value_t*>(array); }
  static value_t* numbers(void* array) { return static_cast<value_t*>(array); }

 private:
  Normaliser<double> normaliser(double eps) const {
    double mean[1], variance[1];
    means(mean,
          [&](int64_t place, int count) { return std::array{Vec::loadu(x_ + place, count)}; });
    means(variance, [&](int64_t place, int count) {
      const Vec distance = Vec::loadu(x_ + place, count) - Vec(mean[0]);
      return std::array{distance * distance};
    });
    return {mean[0], variance[0], eps};
  }

  const BatchNormShape& shape_;
  int64_t begin_;
  const value_t* x_;
  Normaliser<double> xh_;
};

template <typename value_t>
void run_channel(const Channel<value_t>& channel, int64_t index, const BatchNormForward& pass) {
  using Vec = at::vec::Vectorized<value_t>;
  const Vec weight(channel.numbers(pass.weight)[index]), bias(channel.numbers(pass.bias)[index]);
  auto* y = channel.numbers(pass.y);
  channel.each([&](int64_t place, int count) {
    (weight * channel.xh(place, count) + bias).store(y + place, count);
  });
}

template <typename value_t>
void run_channel(const Channel<value_t>& channel, int64_t index, const BatchNormBackward& pass) {
  using Vec = at::vec::Vectorized<value_t>;
  const auto* grad = channel.numbers(pass.g);
  double means[3];
  channel.means(means, [&](int64_t place, int count) {
    const Vec g = Vec::loadu(grad + place, count), xh = channel.xh(place, count);
    return std::array{g, g * xh, xh};
  });
  // The mean of xh is 0 but for rounding, which a g far from 0 would carry into the product.
  means[1] -= means[0] * means[2];
  const double weight = channel.numbers(pass.weight)[index];
  const Centred<double> of_g{weight * channel.xh().rstd, means[0], means[1]};
  auto* grad_x = channel.numbers(pass.grad_x);
  channel.each([&](int64_t place, int count) {
    of_g(Vec::loadu(grad + place, count), channel.xh(place, count)).store(grad_x + place, count);
  });
  channel.numbers(pass.grad_bias)[index] = means[0] * channel.count();
  channel.numbers(pass.grad_weight)[index] = means[1] * channel.count();
}

template <typename value_t>
void run_channel(const Channel<value_t>& channel, int64_t index, const BatchNormSecond& pass) {
  using Vec = at::vec::Vectorized<value_t>;
  const auto *along = channel.numbers(pass.v), *grad = channel.numbers(pass.g);
  double means_of[6];
  channel.means(means_of, [&](int64_t place, int count) {
    const Vec v = Vec::loadu(along + place, count), g = Vec::loadu(grad + place, count);
    const Vec xh = channel.xh(place, count);
    return std::array{v, g, v * xh, g * xh, v * g, xh};
  });
  // As in the gradient: the mean of xh is rounding.
  const double means[5] = {means_of[0], means_of[1], means_of[2] - means_of[0] * means_of[5],
                           means_of[3] - means_of[1] * means_of[5], means_of[4]};
  const auto number = [&](const void* rows) -> double { return channel.numbers(rows)[index]; };
  const SecondGradient<double> second(means, number(pass.weight), channel.xh().rstd, number(pass.w),
                                      number(pass.b), channel.count());
  auto *grad_g = channel.numbers(pass.grad_g), *grad_x = channel.numbers(pass.grad_x);
  channel.each([&](int64_t place, int count) {
    const Vec v = Vec::loadu(along + place, count), g = Vec::loadu(grad + place, count);
    const Vec xh = channel.xh(place, count);
    second.grad_g(v, xh).store(grad_g + place, count);
    second.grad_x(v, g, xh).store(grad_x + place, count);
  });
  channel.numbers(pass.grad_weight)[index] = second.grad_weight;
}

struct OnCpu {
  template <typename Pass>
  static void run(Dtype dtype, const BatchNormShape& shape, double eps, const Pass& pass,
                  const at::Tensor&) {
    if (dtype == Dtype::kFloat) {
      run_as<float>(shape, eps, pass);
    } else {
      run_as<double>(shape, eps, pass);
    }
  }

  template <typename value_t, typename Pass>
  static void run_as(const BatchNormShape& shape, double eps, const Pass& pass) {
    // Small channels: several make a thread's work.
    const int64_t grain = std::max<int64_t>(1, kGrain / shape.count());
    parallel_for(0, shape.all_channels(), grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        run_channel(Channel<value_t>(shape, i, pass.x, eps), i, pass);
      }
    });
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(fastmeta, CPU, m) { register_batch_norm<OnCpu>(m); }

}  // namespace fastmeta
