// CPU implementation of activations, in vectors.
#include <ATen/cpu/vec/vec.h>

#include <algorithm>

#include "activation/activation_ops.h"
#include "common/cpu/parallel.h"
#include "execution/cpu/math.h"

namespace fastmeta {
namespace {

// A vector's numbers, from `begin` on; the last vector has fewer.
template <typename value_t>
struct VectorAt {
  using Vec = at::vec::Vectorized<value_t>;

  int64_t begin;
  int count;

  Vec load(const value_t* array) const { return Vec::loadu(array + begin, count); }
  void store(value_t* array, const Vec& numbers) const { numbers.store(array + begin, count); }
};

struct OnCpu {
  template <template <typename> typename Pass, typename value_t>
  static void run(const Activation& f, int64_t count, const Pass<value_t>& pass,
                  const at::Tensor&) {
    constexpr int64_t kSize = at::vec::Vectorized<value_t>::size();
    constexpr int64_t kNumbers = 4096;  // a thread's least work
    with_known_activation(f, [&](const auto& known) {
      parallel_for(0, count, kNumbers, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i += kSize) {
          pass(known, VectorAt<value_t>{i, static_cast<int>(std::min(kSize, end - i))});
        }
      });
    });
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(fastmeta, CPU, m) { register_activation<OnCpu>(m); }

}  // namespace fastmeta
