// What runs the passes of the layers: an executor. The layers are written once, over this concept:
//
//   storage_t                 what arrays hold: a number, or the numbers of several tasks
//   map(n, f)                 f(cell) for each element of an array; a cell may be several elements
//   rows(n, f)                f(team, row) for each row; a team's members share the row's elements
//   reduce(n, f, target)      target[0] += sum over elements of f(cell)
//   product(p, finish)        a sum of matrix products; then finish(cell) for each element of C
//
// Each returns, or on a device is ordered, after the one before it. An executor is a CPU thread
// that takes a task, or as many tasks as a vector has lanes; for a GPU the host, which launches a
// kernel for all tasks, or writes down the steps that a block is to take with each.
//
// A cell has load(array, offset = 0), store(array, value, offset = 0) of its own elements, and
// load_one(array, i) of the same element for all. A team has lane, size, sum(x), larger(x), and
// load(array, i), store(array, i, value).
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace fastmeta {

// An array of every task: task t's begins at data + t * task_stride.
template <typename storage_t>
struct Array {
  storage_t* data = nullptr;
  int64_t task_stride = 0;

  FASTMETA_HOST_DEVICE explicit operator bool() const { return data != nullptr; }
  FASTMETA_HOST_DEVICE Array from(int64_t offset) const {
    return data == nullptr ? Array{} : Array{data + offset, task_stride};
  }
};

enum class Form {
  kNT,  // A [m, k], B [n, k]
  kNN,  // A [m, k], B [k, n]
  kTN,  // A [k, m], B [k, n]
};

// What becomes of a sum: it takes the place of what is there, is added to it, or, where there is a
// step size, step_size[0] times the sum is subtracted from it.
template <typename storage_t>
struct Accumulation {
  bool adds = false;
  Array<storage_t> step_size = {};

  FASTMETA_HOST_DEVICE Accumulation or_adds(bool also) const { return {adds || also, step_size}; }
};

// C [m, n] (+)= bias [n] + the sum over pairs of op(A) op(B). No bias where there is a step size.
template <typename storage_t>
struct Product {
  Form form;
  int64_t m, n, k;
  Array<storage_t> c;
  Accumulation<storage_t> into = {};
  Array<storage_t> bias = {};
  int pairs = 0;
  Array<storage_t> a[2] = {}, b[2] = {};

  FASTMETA_HOST_DEVICE void add(Array<storage_t> left, Array<storage_t> right) {
    a[pairs] = left;
    b[pairs] = right;
    ++pairs;
  }
};

struct NoFinish {
  template <typename Cell>
  FASTMETA_HOST_DEVICE void operator()(const Cell&) const {}
};

// Nothing is done with the gradient of a parameter.
struct NoUpdate {
  FASTMETA_HOST_DEVICE NoFinish from(int64_t) const { return {}; }
};

}  // namespace fastmeta
