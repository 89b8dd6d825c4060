// Matrix product of each task, on a CPU: forward, input gradient and weight gradient of a linear
// layer. A thread a task.
#include <ATen/Dispatch.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/check.h"
#include "common/cpu/denormals.h"
#include "common/cpu/parallel.h"
#include "common/cpu/register_gemm.h"
#include "common/cpu/row_sums.h"

namespace fastmeta {
namespace {

constexpr int64_t kFewestTasks = 4;

// Computes out [m, n] = op(a) op(b); at most one of the two is transposed.
template <typename value_t>
void product(int64_t m, int64_t n, int64_t depth, const value_t* a, bool transpose_a,
             const value_t* b, bool transpose_b, value_t* out) {
  if (transpose_b) {
    row_dots<value_t>(m, n, depth, a, b, out, n);
  } else {
    multiply<value_t>(m, n, depth, {a, transpose_a ? m : depth, transpose_a}, b, out, false);
  }
}

at::Tensor task_product_cpu(const at::Tensor& a, const at::Tensor& b, bool transpose_a,
                            bool transpose_b) {
  check_dims(a, 3, "a");
  check_dims(b, 3, "b");
  check_same(a, b, "a and b");
  TORCH_CHECK(!(transpose_a && transpose_b), "a and b: expected at most one transposed, got both");
  const auto left = transpose_a ? a.mT() : a, right = transpose_b ? b.mT() : b;
  const int64_t tasks = a.size(0), m = left.size(1), depth = left.size(2), n = right.size(2);
  TORCH_CHECK(b.size(0) == tasks && right.size(1) == depth,
              "a and b: expected shapes that fit, got ", left.sizes(), " and ", right.sizes());
  // One thread owns a task here. PyTorch takes few tasks, and shares each product among threads.
  // The choice must not depend on how many threads there are, so that the bits of a result do not.
  if (tasks < kFewestTasks || m * n * depth == 0) return at::bmm(left, right);
  auto out = at::empty({tasks, m, n}, a.options());
  const auto from_a = a.contiguous(), from_b = b.contiguous();
  AT_DISPATCH_FLOATING_TYPES(a.scalar_type(), "task_product", [&] {
    const auto* data_a = from_a.const_data_ptr<scalar_t>();
    const auto* data_b = from_b.const_data_ptr<scalar_t>();
    auto* data = out.mutable_data_ptr<scalar_t>();
    parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      const FlushDenormals flush;
      for (int64_t t = begin; t < end; ++t) {
        product(m, n, depth, data_a + t * m * depth, transpose_a, data_b + t * depth * n,
                transpose_b, data + t * m * n);
      }
    });
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastmeta, CPU, m) { m.impl("task_product", &task_product_cpu); }

}  // namespace fastmeta
