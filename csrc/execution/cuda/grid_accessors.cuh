// Accessors and thread groups of kernels that run one step of all tasks: arrays are in global
// memory. Half types are loaded as float, and rounded when stored.
#pragma once

#include "common/cuda/reduce.cuh"
#include "common/cuda/scalar.cuh"
#include "execution/cuda/warp_thread_group.cuh"
#include "execution/executor.h"

namespace fastmeta {

template <typename value_t>
struct GlobalAccessor {
  using number_t = acc_t<value_t>;
  int64_t task, index;

  __device__ number_t load(const Array<value_t>& a, int64_t offset = 0) const {
    return load_one(a, offset + index);
  }
  __device__ void store(const Array<value_t>& a, number_t value, int64_t offset = 0) const {
    a.data[task * a.task_stride + offset + index] = narrow<value_t>(value);
  }
  template <typename stored_t>
  __device__ number_t load_one(const Array<stored_t>& a, int64_t i) const {
    return widen(a.data[task * a.task_stride + i]);
  }
};

// A channel of a position.
template <typename value_t>
struct GlobalImageAccessor {
  using number_t = value_t;
  int64_t task, channel;
  int image, h, w;

  __device__ value_t load(const Array<value_t>& a, int64_t begin) const {
    return a.data[task * a.task_stride + begin + channel];
  }
  __device__ void store(const Array<value_t>& a, int64_t begin, value_t value) const {
    a.data[task * a.task_stride + begin + channel] = value;
  }
};

template <typename value_t>
struct GlobalThreadGroup : WarpThreadGroup<acc_t<value_t>> {
  int64_t task;

  __device__ GlobalThreadGroup(int lane, int64_t t)
      : WarpThreadGroup<acc_t<value_t>>{lane}, task(t) {}
  __device__ acc_t<value_t> load(const Array<value_t>& a, int64_t i) const {
    return widen(a.data[task * a.task_stride + i]);
  }
  __device__ void store(const Array<value_t>& a, int64_t i, value_t value) const {
    a.data[task * a.task_stride + i] = value;
  }
};

}  // namespace fastmeta
