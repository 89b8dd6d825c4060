#include "common/ceil_div.h"
#include "common/cuda/launch.cuh"
#include "common/cuda/scalar.cuh"
#include "pair_pool/pair_pool.h"

namespace fastmeta {
namespace {

constexpr int kThreads = 256;

// Numbers of a map and windows of it, in 32 bits: 64-bit divisions are calls that spill.
struct MapShape {
  unsigned height, width, pool, rows, columns, windows, numbers;

  explicit MapShape(const PairPoolShape& s)
      : height(static_cast<unsigned>(s.height)),
        width(static_cast<unsigned>(s.width)),
        pool(static_cast<unsigned>(s.pool)),
        rows(static_cast<unsigned>(s.rows())),
        columns(static_cast<unsigned>(s.columns())),
        windows(static_cast<unsigned>(s.windows())),
        numbers(static_cast<unsigned>(s.numbers())) {}

  // First pixel of a window.
  __device__ unsigned corner(unsigned window) const {
    const unsigned line = window / columns;
    return (line / rows * height + line % rows * pool) * width + window % columns * pool;
  }
};

// A block's windows of one pair of maps: neighbours in neighbouring threads.
struct PairOfMaps {
  int64_t query, other, pair;  // numbers of the maps and of the pair, of all tasks
  unsigned window;

  __device__ PairOfMaps(const MapShape& map, int64_t queries, int64_t classes) {
    const unsigned blocks = ceil_div(map.windows, unsigned(kThreads));
    pair = blockIdx.x / blocks;
    query = pair / classes;
    other = query / queries * classes + pair % classes;
    window = blockIdx.x % blocks * kThreads + threadIdx.x;
  }
  static int64_t blocks(const PairPoolShape& s) {
    return s.tasks * s.queries * s.classes * ceil_div(s.windows(), int64_t(kThreads));
  }
};

// pooled and place of a window of a pair; [T, Q, C, H, W], [T, N, C, H, W] -> [T, Q, N, C, H', W'].
// A thread owns a window; sums in acc_t. NaN wins, as in max_pool2d.
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    pair_pool_kernel(MapShape map, int64_t queries, int64_t classes, const scalar_t* x,
                     const scalar_t* y, scalar_t* pooled, uint8_t* place) {
  const PairOfMaps at(map, queries, classes);
  if (at.window >= map.windows) return;
  const unsigned corner = map.corner(at.window);
  x += at.query * map.numbers + corner;
  y += at.other * map.numbers + corner;
  acc_t<scalar_t> largest = 0;
  unsigned first = kNoPlace;
  for (unsigned i = 0; i < map.pool; ++i) {
    for (unsigned j = 0; j < map.pool; ++j) {
      const acc_t<scalar_t> sum = widen(x[i * map.width + j]) + widen(y[i * map.width + j]);
      if (sum > largest || sum != sum) {
        largest = sum;
        first = i * map.pool + j;
      }
    }
  }
  const int64_t target = at.pair * map.windows + at.window;
  pooled[target] = narrow<scalar_t>(largest);
  place[target] = static_cast<uint8_t>(first);
}

// out = x + y at each window's place, 0 at kNoPlace. Threads as above.
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    pair_gather_kernel(MapShape map, int64_t queries, int64_t classes, const scalar_t* x,
                       const scalar_t* y, const uint8_t* place, scalar_t* out) {
  const PairOfMaps at(map, queries, classes);
  if (at.window >= map.windows) return;
  const int64_t target = at.pair * map.windows + at.window;
  const unsigned tap = place[target];
  acc_t<scalar_t> sum = 0;
  if (tap < map.pool * map.pool) {
    const unsigned pixel = map.corner(at.window) + tap / map.pool * map.width + tap % map.pool;
    sum = widen(x[at.query * map.numbers + pixel]) + widen(y[at.other * map.numbers + pixel]);
  }
  out[target] = narrow<scalar_t>(sum);
}

// A side of the gradient: `own` maps a task, each of which sums over `others`. A pair's windows are
// own_stride and other_stride pairs apart from the next map's.
template <typename scalar_t>
struct PoolSide {
  int64_t own, others, own_stride, other_stride;
  scalar_t* grad;
};

// grad[t, r, pixel] = sum over k of the gradients of the pairs (r, k) whose place is the pixel.
// A thread owns a pixel of a map of a side, and sums in the order of k, in acc_t.
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    pair_scatter_kernel(MapShape map, PoolSide<scalar_t> x, PoolSide<scalar_t> y, int64_t x_blocks,
                        int64_t pairs, const scalar_t* grad_pooled, const uint8_t* place) {
  const bool is_x = blockIdx.x < x_blocks;
  const PoolSide<scalar_t> side = is_x ? x : y;
  const int64_t block = is_x ? blockIdx.x : blockIdx.x - x_blocks;
  const unsigned blocks = ceil_div(map.numbers, unsigned(kThreads));
  const int64_t own = block / blocks;
  const unsigned pixel = static_cast<unsigned>(block % blocks) * kThreads + threadIdx.x;
  if (pixel >= map.numbers) return;
  const unsigned line = pixel / map.width, column = pixel % map.width;
  const unsigned channel = line / map.height, row = line % map.height;
  acc_t<scalar_t> sum = 0;
  // Pixels of no window keep the sum 0.
  if (row < map.rows * map.pool && column < map.columns * map.pool) {
    const unsigned window = (channel * map.rows + row / map.pool) * map.columns + column / map.pool;
    const unsigned tap = row % map.pool * map.pool + column % map.pool;
    const int64_t first = own / side.own * pairs + own % side.own * side.own_stride;
    for (int64_t k = 0; k < side.others; ++k) {
      const int64_t at = (first + k * side.other_stride) * map.windows + window;
      if (place[at] == tap) sum += widen(grad_pooled[at]);
    }
  }
  side.grad[own * map.numbers + pixel] = narrow<scalar_t>(sum);
}

}  // namespace

int launch_pair_pool(Dtype dtype, const PairPoolShape& shape, const void* x, const void* y,
                     void* pooled, uint8_t* place, void* stream) {
  return with_dtype(dtype, [&](auto type) -> int {
    using scalar_t = typename decltype(type)::type;
    return launch(pair_pool_kernel<scalar_t>, PairOfMaps::blocks(shape), kThreads, 0,
                  static_cast<cudaStream_t>(stream), MapShape(shape), shape.queries, shape.classes,
                  static_cast<const scalar_t*>(x), static_cast<const scalar_t*>(y),
                  static_cast<scalar_t*>(pooled), place);
  });
}

int launch_pair_pool_gather(Dtype dtype, const PairPoolShape& shape, const void* x, const void* y,
                            const uint8_t* place, void* out, void* stream) {
  return with_dtype(dtype, [&](auto type) -> int {
    using scalar_t = typename decltype(type)::type;
    return launch(pair_gather_kernel<scalar_t>, PairOfMaps::blocks(shape), kThreads, 0,
                  static_cast<cudaStream_t>(stream), MapShape(shape), shape.queries, shape.classes,
                  static_cast<const scalar_t*>(x), static_cast<const scalar_t*>(y), place,
                  static_cast<scalar_t*>(out));
  });
}

int launch_pair_pool_backward(Dtype dtype, const PairPoolShape& s, const void* grad_pooled,
                              const uint8_t* place, void* grad_x, void* grad_y, void* stream) {
  return with_dtype(dtype, [&](auto type) -> int {
    using scalar_t = typename decltype(type)::type;
    const PoolSide<scalar_t> x{s.queries, s.classes, s.classes, 1, static_cast<scalar_t*>(grad_x)};
    const PoolSide<scalar_t> y{s.classes, s.queries, 1, s.classes, static_cast<scalar_t*>(grad_y)};
    const int64_t blocks = ceil_div(s.numbers(), int64_t(kThreads));
    const int64_t x_blocks = s.tasks * s.queries * blocks, y_blocks = s.tasks * s.classes * blocks;
    return launch(pair_scatter_kernel<scalar_t>, x_blocks + y_blocks, kThreads, 0,
                  static_cast<cudaStream_t>(stream), MapShape(s), x, y, x_blocks,
                  s.queries * s.classes, static_cast<const scalar_t*>(grad_pooled), place);
  });
}

}  // namespace fastmeta
