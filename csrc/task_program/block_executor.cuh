// The executor that is a block with one task, all of it in shared memory.
#pragma once

#include <type_traits>

#include "task_program/block_product.cuh"
#include "task_program/warp_team.cuh"

namespace fastmeta {

template <typename value_t>
__device__ value_t& shared_number(const Array<InShared<value_t>>& a, int64_t i) {
  return dynamic_shared<value_t>()[a.offset + static_cast<int>(i)];
}

template <typename value_t>
struct SharedCell {
  using number_t = value_t;
  int index;

  __device__ value_t load(const Array<InShared<value_t>>& a, int64_t offset = 0) const {
    return shared_number(a, offset + index);
  }
  __device__ void store(const Array<InShared<value_t>>& a, value_t value,
                        int64_t offset = 0) const {
    shared_number(a, offset + index) = value;
  }
  __device__ value_t load_one(const Array<InShared<value_t>>& a, int64_t i) const {
    return shared_number(a, i);
  }
};

template <typename value_t>
struct SharedTeam : WarpTeam<value_t> {
  int64_t task;

  __device__ SharedTeam(int lane, int64_t t) : WarpTeam<value_t>{lane}, task(t) {}
  __device__ value_t load(const Array<InShared<value_t>>& a, int64_t i) const {
    return shared_number(a, i);
  }
  __device__ void store(const Array<InShared<value_t>>& a, int64_t i, value_t value) const {
    shared_number(a, i) = value;
  }
};

template <typename value_t>
class BlockExecutor {
 public:
  using storage_t = InShared<value_t>;
  using Numbers = Array<storage_t>;
  static constexpr bool kCompilesEachActivation = false;

  // partials: a number for each warp.
  __device__ explicit BlockExecutor(value_t* partials) : partials_(partials) {}

  template <typename F>
  __device__ void map(int64_t n, const F& f) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) f(SharedCell<value_t>{i});
    end_step();
  }

  template <typename F>
  __device__ void rows(int64_t n, const F& f) {
    const SharedTeam<value_t> team(threadIdx.x % kWarp, blockIdx.x);
    for (int row = warp(); row < n; row += warps()) f(team, row);
    end_step();
  }

  template <typename F>
  __device__ void reduce(int64_t n, const F& f, const Numbers& target) {
    value_t sum = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) sum += f(SharedCell<value_t>{i});
    sum = warp_sum(sum);
    if (threadIdx.x % kWarp == 0) partials_[warp()] = sum;
    end_step();
    if (threadIdx.x == 0) {
      for (int w = 1; w < warps(); ++w) sum += partials_[w];
      shared_number(target, 0) += sum;
    }
    end_step();
  }

  template <typename Finish>
  __device__ void product(const Product<storage_t>& p, const Finish& finish) {
    const auto number = [](int64_t x) { return static_cast<int>(x); };
    block_product<value_t>({p.form,
                            number(p.m),
                            number(p.n),
                            number(p.k),
                            p.c.offset,
                            p.bias.offset,
                            p.accumulates,
                            p.pairs,
                            {p.a[0].offset, p.a[1].offset},
                            {p.b[0].offset, p.b[1].offset}});
    end_step();
    if constexpr (!std::is_same_v<Finish, NoFinish>) map(p.m * p.n, finish);
  }

  // What the threads of the block wrote is there for all of them.
  __device__ void end_step() const { __syncthreads(); }

 private:
  static __device__ int warp() { return threadIdx.x / kWarp; }
  static __device__ int warps() { return blockDim.x / kWarp; }

  value_t* partials_;
};

}  // namespace fastmeta
