// CPU implementation of pair_pool.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <tuple>

#include "common/cpu/parallel.h"
#include "execution/cpu/math.h"
#include "pair_pool/arguments.h"
#include "pair_pool/planes_cpu.h"

namespace fastmeta {
namespace {

using at::Tensor;

template <typename value_t>
using Vec = at::vec::Vectorized<value_t>;

// Calls body(q) for the rows of queries of a task, in parallel; a row has `work` operations.
template <typename Body>
void for_each_query(const PairPoolShape& s, const Body& body) {
  const int64_t work = std::max<int64_t>(1, s.classes * s.windows() * s.taps());
  parallel_for(0, s.queries, std::max<int64_t>(1, kGrain / work), [&](int64_t begin, int64_t end) {
    for (int64_t q = begin; q < end; ++q) body(q);
  });
}

// A vector of windows of a pair: the maximum and its place, as a number.
template <typename value_t>
struct Largest {
  Vec<value_t> value, place;

  Largest(const value_t* x, const value_t* y, int64_t taps, int64_t width)
      : value(value_t(0)), place(value_t(kNoPlace)) {
    using M = Math<Vec<value_t>>;
    for (int64_t tap = 0; tap < taps; ++tap) {
      const Vec<value_t> sum =
          Vec<value_t>::loadu(x + tap * width) + Vec<value_t>::loadu(y + tap * width);
      const Vec<value_t> number(static_cast<value_t>(tap));
      // NaN is equal to nothing, and wins, as in max_pool2d.
      place = M::if_equal(sum, sum, M::if_less(value, sum, number, place), number);
      value = M::if_equal(sum, sum, M::if_less(value, sum, sum, value), sum);
    }
  }
};

template <typename scalar_t>
void pool_task(const PairPoolShape& s, const Planes<scalar_t>& x, const Planes<scalar_t>& y,
               scalar_t* pooled, uint8_t* place) {
  using value_t = acc_t<scalar_t>;
  const int64_t width = x.width(), windows = s.windows();
  for_each_query(s, [&](int64_t q) {
    Buffer<value_t> values(width), places(width);
    for (int64_t n = 0; n < s.classes; ++n) {
      for (int64_t w = 0; w < width; w += Vec<value_t>::size()) {
        const Largest<value_t> largest(x.map(q) + w, y.map(n) + w, s.taps(), width);
        largest.value.store(&values[w]);
        largest.place.store(&places[w]);
      }
      const int64_t first = (q * s.classes + n) * windows;
      narrow(values.data(), pooled + first, windows);
      for (int64_t w = 0; w < windows; ++w) place[first + w] = static_cast<uint8_t>(places[w]);
    }
  });
}

template <typename scalar_t>
void gather_task(const PairPoolShape& s, const Planes<scalar_t>& x, const Planes<scalar_t>& y,
                 const uint8_t* place, scalar_t* out) {
  using value_t = acc_t<scalar_t>;
  const int64_t width = x.width(), windows = s.windows();
  for_each_query(s, [&](int64_t q) {
    for (int64_t n = 0; n < s.classes; ++n) {
      const value_t *of_x = x.map(q), *of_y = y.map(n);
      const int64_t first = (q * s.classes + n) * windows;
      for (int64_t w = 0; w < windows; ++w) {
        const int64_t tap = place[first + w];
        const bool is_there = tap < s.taps();
        const int64_t at = is_there ? tap * width + w : w;
        out[first + w] = static_cast<scalar_t>(is_there ? of_x[at] + of_y[at] : value_t(0));
      }
    }
  });
}

// Adds the gradients of a task to planes of zeros. Threads own windows: every sum has one order.
template <typename scalar_t>
void scatter_task(const PairPoolShape& s, const scalar_t* grad, const uint8_t* place,
                  Planes<scalar_t>& x, Planes<scalar_t>& y) {
  using value_t = acc_t<scalar_t>;
  using M = Math<Vec<value_t>>;
  constexpr int64_t kLanes = 64;  // windows of a piece: cache lines of the gradient
  const int64_t width = x.width(), windows = s.windows();
  const int64_t work = std::max<int64_t>(1, s.queries * s.classes * kLanes * s.taps());
  const auto add = [](value_t* sum, const Vec<value_t>& share) {
    (Vec<value_t>::loadu(sum) + share).store(sum);
  };
  const auto piece = [&](int64_t first) {
    const int64_t count = std::min(kLanes, windows - first);
    const int64_t lanes = std::min(kLanes, width - first);
    std::array<value_t, kLanes> g{}, places{};
    for (int64_t q = 0; q < s.queries; ++q) {
      for (int64_t n = 0; n < s.classes; ++n) {
        const int64_t at = (q * s.classes + n) * windows + first;
        for (int64_t w = 0; w < count; ++w) {
          g[w] = static_cast<value_t>(grad[at + w]);
          places[w] = static_cast<value_t>(place[at + w]);
        }
        for (int64_t tap = 0; tap < s.taps(); ++tap) {
          const Vec<value_t> number(static_cast<value_t>(tap)), zero(value_t(0));
          value_t *of_x = x.map(q) + tap * width + first, *of_y = y.map(n) + tap * width + first;
          for (int64_t w = 0; w < lanes; w += Vec<value_t>::size()) {
            const auto share = M::if_equal(Vec<value_t>::loadu(&places[w]), number,
                                           Vec<value_t>::loadu(&g[w]), zero);
            add(of_x + w, share);
            add(of_y + w, share);
          }
        }
      }
    }
  };
  parallel_for(0, ceil_div(windows, kLanes), std::max<int64_t>(1, kGrain / work),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) piece(i * kLanes);
               });
}

// Calls body(t, x, y) for each task with planes for its maps, whose contents are old.
template <typename scalar_t, typename Body>
void for_each_task(const PairPoolShape& s, const Body& body) {
  for_each_task_range(s.tasks, [&](int64_t begin, int64_t end) {
    Planes<scalar_t> x(s, s.queries), y(s, s.classes);
    for (int64_t t = begin; t < end; ++t) body(t, x, y);
  });
}

std::tuple<Tensor, Tensor> pair_pool_cpu(const Tensor& x, const Tensor& y, int64_t pool) {
  const auto s = checked_pair_pool_shape(x, y, pool);
  const auto maps = x.contiguous(), others = y.contiguous();
  auto pooled = at::empty(pooled_sizes(s), x.options());
  auto place = at::empty(pooled_sizes(s), x.options().dtype(at::kByte));
  if (pooled.numel() == 0) return {pooled, place};
  const int64_t of_task = s.queries * s.classes * s.windows();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "pair_pool", [&] {
    const auto* from_x = maps.const_data_ptr<scalar_t>();
    const auto* from_y = others.const_data_ptr<scalar_t>();
    auto* to = pooled.mutable_data_ptr<scalar_t>();
    auto* places = place.mutable_data_ptr<uint8_t>();
    for_each_task<scalar_t>(s, [&](int64_t t, auto& of_x, auto& of_y) {
      of_x.read(from_x + t * s.queries * s.numbers());
      of_y.read(from_y + t * s.classes * s.numbers());
      pool_task<scalar_t>(s, of_x, of_y, to + t * of_task, places + t * of_task);
    });
  });
  return {pooled, place};
}

Tensor pair_pool_gather_cpu(const Tensor& x, const Tensor& y, const Tensor& place, int64_t pool) {
  const auto s = checked_pair_pool_shape(x, y, pool);
  check_pair_pool_place(place, x, pooled_sizes(s));
  const auto maps = x.contiguous(), others = y.contiguous(), index = place.contiguous();
  auto out = at::empty(pooled_sizes(s), x.options());
  if (out.numel() == 0) return out;
  const int64_t of_task = s.queries * s.classes * s.windows();
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, x.scalar_type(), "pair_pool_gather", [&] {
        const auto* from_x = maps.const_data_ptr<scalar_t>();
        const auto* from_y = others.const_data_ptr<scalar_t>();
        const auto* places = index.const_data_ptr<uint8_t>();
        auto* to = out.mutable_data_ptr<scalar_t>();
        for_each_task<scalar_t>(s, [&](int64_t t, auto& of_x, auto& of_y) {
          of_x.read(from_x + t * s.queries * s.numbers());
          of_y.read(from_y + t * s.classes * s.numbers());
          gather_task<scalar_t>(s, of_x, of_y, places + t * of_task, to + t * of_task);
        });
      });
  return out;
}

std::tuple<Tensor, Tensor> pair_pool_backward_cpu(const Tensor& grad_pooled, const Tensor& place,
                                                  at::IntArrayRef size, int64_t pool) {
  const auto s = checked_pair_pool_backward_shape(grad_pooled, place, size, pool);
  const auto grad = grad_pooled.contiguous(), index = place.contiguous();
  auto grad_x =
      at::zeros({s.tasks, s.queries, s.channels, s.height, s.width}, grad_pooled.options());
  auto grad_y =
      at::zeros({s.tasks, s.classes, s.channels, s.height, s.width}, grad_pooled.options());
  if (grad.numel() == 0) return {grad_x, grad_y};
  const int64_t of_task = s.queries * s.classes * s.windows();
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, grad.scalar_type(), "pair_pool_backward", [&] {
        const auto* from = grad.const_data_ptr<scalar_t>();
        const auto* places = index.const_data_ptr<uint8_t>();
        auto* to_x = grad_x.mutable_data_ptr<scalar_t>();
        auto* to_y = grad_y.mutable_data_ptr<scalar_t>();
        for_each_task<scalar_t>(s, [&](int64_t t, auto& of_x, auto& of_y) {
          of_x.clear();
          of_y.clear();
          scatter_task<scalar_t>(s, from + t * of_task, places + t * of_task, of_x, of_y);
          of_x.write(to_x + t * s.queries * s.numbers());
          of_y.write(to_y + t * s.classes * s.numbers());
        });
      });
  return {grad_x, grad_y};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastmeta, CPU, m) {
  m.impl("pair_pool", &pair_pool_cpu);
  m.impl("pair_pool_backward", &pair_pool_backward_cpu);
  m.impl("pair_pool_gather", &pair_pool_gather_cpu);
}

}  // namespace fastmeta
