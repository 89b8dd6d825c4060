// CPU kernels of prototypes: one owner a (task, slice of features), so sums need no atomics.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <vector>

#include "common/cpu/parallel.h"
#include "common/cpu/widen.h"
#include "common/labels.h"
#include "prototypes/arguments.h"

namespace fastmeta {
namespace {

constexpr int64_t kSlice = 256;
template <typename value_t>
using Slice = std::array<value_t, kSlice>;

std::vector<int64_t> counts_of(const int64_t* labels, const PrototypesShape& shape) {
  std::vector<int64_t> counts(shape.classes, 0);
  for (int64_t s = 0; s < shape.support; ++s) {
    if (labels[s] != kAbsent) ++counts[labels[s]];
  }
  return counts;
}

// Calls body(task, counts, first feature, number of features) for every slice, in parallel.
template <typename Body>
void for_each_slice(const int64_t* labels, const PrototypesShape& shape, const Body& body) {
  const int64_t slices = (shape.features + kSlice - 1) / kSlice;
  // Additions of a slice, which decide how many repay a thread.
  const int64_t work = std::max<int64_t>(1, shape.support * std::min(kSlice, shape.features));
  const int64_t grain = std::max<int64_t>(1, kGrain / work);
  parallel_for(0, shape.tasks * slices, grain, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> counts;
    for (int64_t i = begin; i < end; ++i) {
      // Counts labels once a task, not once a slice.
      if (i == begin || i % slices == 0) {
        counts = counts_of(labels + i / slices * shape.support, shape);
      }
      const int64_t first = i % slices * kSlice;
      body(i / slices, counts, first, std::min(kSlice, shape.features - first));
    }
  });
}

template <typename value_t>
void add(const value_t* x, value_t* sum, int64_t n) {
  using Vec = at::vec::Vectorized<value_t>;
  at::vec::map2<value_t>([](Vec a, Vec b) { return a + b; }, sum, sum, x, n);
}

template <typename value_t>
void divide(const value_t* x, value_t* out, int64_t n, int64_t count) {
  using Vec = at::vec::Vectorized<value_t>;
  const Vec divisor(static_cast<value_t>(count));
  at::vec::map<value_t>([divisor](Vec a) { return a / divisor; }, out, x, n);
}

template <typename scalar_t>
void prototypes_kernel(const scalar_t* x, const int64_t* labels, scalar_t* out,
                       const PrototypesShape& shape) {
  using value_t = acc_t<scalar_t>;
  for_each_slice(labels, shape, [&](int64_t t, const auto& counts, int64_t first, int64_t n) {
    // A slice of all classes' sums, small enough for the cache.
    std::vector<value_t> sums(shape.classes * n, 0);
    Slice<value_t> row;
    for (int64_t s = 0; s < shape.support; ++s) {
      const int64_t label = labels[t * shape.support + s];
      if (label == kAbsent) continue;
      const auto* source = x + (t * shape.support + s) * shape.features + first;
      add(widen(source, row.data(), n), &sums[label * n], n);
    }
    for (int64_t c = 0; c < shape.classes; ++c) {
      // A class without examples keeps its sum 0.
      divide(&sums[c * n], row.data(), n, std::max<int64_t>(1, counts[c]));
      narrow(row.data(), out + (t * shape.classes + c) * shape.features + first, n);
    }
  });
}

template <typename scalar_t>
void prototypes_backward_kernel(const scalar_t* grad, const int64_t* labels, scalar_t* grad_x,
                                const PrototypesShape& shape) {
  using value_t = acc_t<scalar_t>;
  for_each_slice(labels, shape, [&](int64_t t, const auto& counts, int64_t first, int64_t n) {
    Slice<value_t> row;
    for (int64_t s = 0; s < shape.support; ++s) {
      const int64_t label = labels[t * shape.support + s];
      scalar_t* target = grad_x + (t * shape.support + s) * shape.features + first;
      if (label == kAbsent) {
        std::fill_n(target, n, scalar_t(0));
        continue;
      }
      const auto* source = grad + (t * shape.classes + label) * shape.features + first;
      divide(widen(source, row.data(), n), row.data(), n, counts[label]);
      narrow(row.data(), target, n);
    }
  });
}

at::Tensor prototypes_cpu(const at::Tensor& x, const at::Tensor& labels, int64_t num_classes) {
  const PrototypesShape shape = checked_prototypes_shape(x, labels, num_classes);
  const auto embeddings = x.contiguous(), classes = labels.contiguous();
  check_label_range(classes, num_classes, "labels");
  auto out = at::empty({shape.tasks, shape.classes, shape.features}, x.options());
  if (out.numel() == 0) return out;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "prototypes", [&] {
    prototypes_kernel(embeddings.const_data_ptr<scalar_t>(), classes.const_data_ptr<int64_t>(),
                      out.mutable_data_ptr<scalar_t>(), shape);
  });
  return out;
}

at::Tensor prototypes_backward_cpu(const at::Tensor& grad_prototypes, const at::Tensor& labels) {
  const PrototypesShape shape = checked_prototypes_backward_shape(grad_prototypes, labels);
  const auto grad = grad_prototypes.contiguous(), classes = labels.contiguous();
  check_label_range(classes, shape.classes, "labels");
  auto grad_x = at::empty({shape.tasks, shape.support, shape.features}, grad.options());
  if (grad_x.numel() == 0) return grad_x;
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, grad.scalar_type(), "prototypes_backward", [&] {
        prototypes_backward_kernel(grad.const_data_ptr<scalar_t>(),
                                   classes.const_data_ptr<int64_t>(),
                                   grad_x.mutable_data_ptr<scalar_t>(), shape);
      });
  return grad_x;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastmeta, CPU, m) {
  m.impl("prototypes", &prototypes_cpu);
  m.impl("prototypes_backward", &prototypes_backward_cpu);
}

}  // namespace fastmeta
