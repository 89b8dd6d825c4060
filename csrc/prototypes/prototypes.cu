#include <type_traits>

#include "common/ceil_div.h"
#include "common/cuda/copy.cuh"
#include "common/cuda/launch.cuh"
#include "common/cuda/reduce.cuh"
#include "prototypes/prototypes.h"

namespace fastmeta {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;

// A warp's share: one class of one task, and a pack of features a lane. The kernels see rows as
// packs, so the features of their shape count packs.
struct Owner {
  int64_t task, member, feature;

  __device__ Owner(const PrototypesShape& shape, int64_t owned_classes) {
    const int64_t warp = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
    const int64_t slices = ceil_div(shape.features, kWarp);
    task = warp / slices / owned_classes;
    member = warp / slices % owned_classes;
    feature = warp % slices * kWarp + threadIdx.x % kWarp;
  }
  static int64_t blocks(const PrototypesShape& shape, int64_t owned_classes) {
    return ceil_div(shape.tasks * owned_classes * ceil_div(shape.features, kWarp), kWarps);
  }
};

// Calls body(s) for the examples s of a class, in order, by a whole warp; returns their number.
// Examples without a valid label form the class number `classes`.
template <typename Body>
__device__ int64_t for_each_example(const int64_t* labels, const PrototypesShape& shape,
                                    int64_t member, const Body& body) {
  int64_t count = 0;
  for (int64_t first = 0; first < shape.support; first += kWarp) {
    const int64_t s = first + threadIdx.x % kWarp;
    const int64_t label = s < shape.support ? labels[s] : -1;
    const bool valid = label >= 0 && label < shape.classes;
    const bool is_member = s < shape.support && (valid ? label : shape.classes) == member;
    unsigned members = __ballot_sync(kAllLanes, is_member);
    count += __popc(members);
    // Walks the set bits from the lowest on: examples in order.
    for (; members != 0; members &= members - 1) body(first + __ffs(members) - 1);
  }
  return count;
}

// prototypes[t, n] = mean of x[t, s] over the s with labels[t, s] == n, zero without one.
// x [T, S, D], labels [T, S], prototypes [T, N, D]. A warp owns a (t, n) and finds its examples by
// ballots of 32 labels; a lane owns a pack of features and sums it over s in order, in acc_t.
// Each owner reads all labels of its task, from the cache: one launch, and nothing to set up.
template <typename scalar_t, int width>
__global__ void __launch_bounds__(kThreads)
    prototypes_kernel(PrototypesShape shape, const Pack<scalar_t, width>* x, const int64_t* labels,
                      Pack<scalar_t, width>* prototypes) {
  const Owner owner(shape, shape.classes);
  if (owner.task >= shape.tasks) return;
  const bool has_features = owner.feature < shape.features;
  const int64_t first = owner.task * shape.support;
  Pack<acc_t<scalar_t>, width> mean{};
  const auto add = [&](int64_t s) {
    if (!has_features) return;
    const auto row = widen(x[(first + s) * shape.features + owner.feature]);
#pragma unroll
    for (int i = 0; i < width; ++i) mean[i] += row[i];
  };
  const int64_t count = for_each_example(labels + first, shape, owner.member, add);
  if (!has_features) return;
#pragma unroll
  // A class without examples keeps its sum 0.
  for (int i = 0; i < width; ++i) mean[i] /= static_cast<acc_t<scalar_t>>(count > 0 ? count : 1);
  const int64_t row = owner.task * shape.classes + owner.member;
  prototypes[row * shape.features + owner.feature] = narrow<scalar_t>(mean);
}

// grad_x[t, s] = grad_prototypes[t, n] / count[t, n] for n = labels[t, s]. Owners as above, and one
// more a task for the examples whose label is out of range: their gradient is zero.
template <typename scalar_t, int width>
__global__ void __launch_bounds__(kThreads)
    prototypes_backward_kernel(PrototypesShape shape, const Pack<scalar_t, width>* grad,
                               const int64_t* labels, Pack<scalar_t, width>* grad_x) {
  const Owner owner(shape, shape.classes + 1);
  if (owner.task >= shape.tasks) return;
  const bool has_features = owner.feature < shape.features;
  const int64_t first = owner.task * shape.support;
  // The count must be known before the first store, so the labels are read twice.
  const int64_t count = for_each_example(labels + first, shape, owner.member, [](int64_t) {});
  Pack<acc_t<scalar_t>, width> share{};
  if (has_features && owner.member < shape.classes && count > 0) {
    const int64_t row = owner.task * shape.classes + owner.member;
    share = widen(grad[row * shape.features + owner.feature]);
#pragma unroll
    for (int i = 0; i < width; ++i) share[i] /= static_cast<acc_t<scalar_t>>(count);
  }
  for_each_example(labels + first, shape, owner.member, [&](int64_t s) {
    if (!has_features) return;
    grad_x[(first + s) * shape.features + owner.feature] = narrow<scalar_t>(share);
  });
}

// Calls run(width) with the number of values in a pack, as a constant.
template <typename scalar_t, typename Run>
int with_width(const PrototypesShape& shape, const scalar_t* a, const scalar_t* b, const Run& run) {
  const bool wide = has_wide_rows(a, shape.features, shape.features) &&
                    has_wide_rows(b, shape.features, shape.features);
  return wide ? run(std::integral_constant<int, kAccess<scalar_t>>{})
              : run(std::integral_constant<int, 1>{});
}

}  // namespace

int launch_prototypes(Dtype dtype, const PrototypesShape& shape, const void* x,
                      const int64_t* labels, void* prototypes, void* stream) {
  return with_dtype(dtype, [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    const auto* source = static_cast<const scalar_t*>(x);
    auto* target = static_cast<scalar_t*>(prototypes);
    return with_width(shape, source, target, [&](auto width) -> int {
      PrototypesShape s = shape;
      s.features /= width;
      return launch(prototypes_kernel<scalar_t, width>, Owner::blocks(s, s.classes), kThreads, 0,
                    static_cast<cudaStream_t>(stream), s, as_packs<width>(source), labels,
                    as_packs<width>(target));
    });
  });
}

int launch_prototypes_backward(Dtype dtype, const PrototypesShape& shape,
                               const void* grad_prototypes, const int64_t* labels, void* grad_x,
                               void* stream) {
  return with_dtype(dtype, [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    const auto* source = static_cast<const scalar_t*>(grad_prototypes);
    auto* target = static_cast<scalar_t*>(grad_x);
    return with_width(shape, source, target, [&](auto width) -> int {
      PrototypesShape s = shape;
      s.features /= width;
      return launch(prototypes_backward_kernel<scalar_t, width>, Owner::blocks(s, s.classes + 1),
                    kThreads, 0, static_cast<cudaStream_t>(stream), s, as_packs<width>(source),
                    labels, as_packs<width>(target));
    });
  });
}

}  // namespace fastmeta
