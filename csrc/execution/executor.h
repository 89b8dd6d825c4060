// What runs the passes of the layers: an executor. The layers are written once, over this concept:
//
//   storage_t                 what arrays hold: a number, or the numbers of several tasks
//   map(n, f)                 f(cell) for each element of an array; a cell may be several elements
//   rows(n, f)                f(team, row) for each row; a team's members share the row's elements
//   reduce(n, f, target)      target[0] += sum over elements of f(cell)
//   product(p, finish)        a sum of matrix products; then finish(cell) for each element of C
//
// and, but for executors of networks so small that they have no images (kHasImages is false),
//
//   convolution(c, finish)    a sum of convolutions, or of their gradients; then finish(cell)
//   table(images, f)          f(cell) for each element of images; a cell lies within one position
//   column_sums(images, whole_batch, f, target)
//                             sums over positions of the two numbers of f(cell), for each channel:
//                             target[image or 0, 0 or 1, channel]
//   column_moments(images, whole_batch, x, target)
//                             of x, its mean over positions and the sum of the squares of its
//                             distances from it: target[image or 0, 0 or 1, channel]
//
// and, where kHasThinBlocks, thin_block(net, convolution, norm) for those that are is_fused: an object
// with the four passes of both, whose convolution has no memory for its outputs.
//
// Each returns, or on a device is ordered, after the one before it. An executor is a CPU thread
// that takes a task, or as many tasks as a vector has lanes; for a GPU the host, which launches a
// kernel for all tasks, or writes down the steps that a block is to take with each.
//
// A cell has load(array, offset = 0), store(array, value, offset = 0) of its own elements, and
// load_one(array, i) of the same element for all. A cell of images has image, h and w of its
// position, and load(array, begin), store(array, begin, value) of its channels in the position whose
// channels begin at `begin`. What column_sums and column_moments make of an image lies 4 x channels
// numbers behind that of the one before; of the whole batch there is one. A team has lane, size,
// sum(x), larger(x), and load(array, i), store(array, i, value).
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "execution/conv_shape.h"

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

// Images, channels-last: [count, height, width, channels].
struct Images {
  int64_t count, height, width, channels;

  FASTMETA_HOST_DEVICE int64_t positions() const { return count * height * width; }
  FASTMETA_HOST_DEVICE int64_t place(int64_t image, int64_t h, int64_t w) const {
    return ((image * height + h) * width + w) * channels;
  }
};

// C (+)= bias [O] + the sum over pairs of a map of convolutions, of `examples` images. A pair is
// (x, w), (dz, w) or (dz, x); C is z, dx or dw. Of z also column_moments() over the batch, where
// wanted.
template <typename storage_t>
struct Convolution {
  ConvShape shape;
  MapTo to;
  int64_t examples;
  Array<storage_t> c;
  Accumulation<storage_t> into = {};
  Array<storage_t> bias = {}, moments = {};
  int pairs = 0;
  Array<storage_t> a[2] = {}, b[2] = {};

  FASTMETA_HOST_DEVICE void add(Array<storage_t> left, Array<storage_t> right) {
    a[pairs] = left;
    b[pairs] = right;
    ++pairs;
  }
  FASTMETA_HOST_DEVICE Images outputs() const {
    return {examples, shape.out_height(), shape.out_width(), shape.outputs};
  }
  // Elements of C.
  FASTMETA_HOST_DEVICE int64_t size() const {
    switch (to) {
      case MapTo::kOutput:
        return examples * shape.out_positions() * shape.outputs;
      case MapTo::kInput:
        return examples * shape.in_positions() * shape.channels;
      case MapTo::kWeight:
        return shape.weight_size();
    }
    return 0;
  }
};

// What column_sums() sums.
template <typename number_t>
struct Two {
  number_t first, second;

  FASTMETA_HOST_DEVICE Two operator+(const Two& other) const {
    return {first + other.first, second + other.second};
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
