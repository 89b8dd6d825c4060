// Executor: the concept that runs the passes of the layers, which are written once over it:
//
//   storage_t                 element of arrays: a number, or the numbers of several tasks
//   map(n, f)                 f(accessor) for each element of an array; it may span several
//   rows(n, f)                f(group, row) for each row; a group's threads share the row's elements
//   reduce(n, f, target)      target[0] += sum over elements of f(accessor)
//   product(p, finish)        a sum of matrix products; then finish(accessor) for each element
//                             of C
//
// and, except in executors of networks so small that they have no images (kHasImages is false),
//
//   convolution(c, finish)    a sum of convolutions, or of their gradients; then
//                             finish(accessor)
//   table(images, f)          f(accessor) for each element of images, within one position
//   column_sums(images, whole_batch, f, target)
//                             sums over positions of the two numbers of f(accessor), for each
//                             channel: target[image or 0, 0 or 1, channel]
//   column_moments(images, whole_batch, x, target)
//                             mean of x over positions, and the sum of the squares of its
//                             distances from the mean: target[image or 0, 0 or 1, channel]
//
// and, if kHasFusedBands, fused_band(net, convolution, norm) for instructions that are is_fused: an
// object with the four passes of both, whose convolution stores no outputs.
//
// Each method returns, or on a device is ordered, after the one before it. An executor is a CPU
// thread with one task, or with as many tasks as a vector has lanes. For a GPU it is the host,
// which launches a kernel for all tasks, or records the steps that a block takes with each task.
//
// An accessor reads and writes its own elements: load(array, offset = 0) and store(array, value,
// offset = 0); load_one(array, i) reads the same element in all of them. An accessor of images
// has image, h and w of its position; load(array, begin) and store(array, begin, value) access its
// channels in the position whose channels begin at `begin`. Results of column_sums and
// column_moments are 4 x channels numbers apart from image to image; the whole batch has one. A
// thread group has lane, size, sum(x), larger(x), and load(array, i), store(array, i, value).
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

// How a sum is written: replace, add, or subtract step_size[0] times it.
template <typename storage_t>
struct StoreMode {
  bool adds = false;
  Array<storage_t> step_size = {};

  FASTMETA_HOST_DEVICE StoreMode or_adds(bool also) const { return {adds || also, step_size}; }
};

// A product: C [m, n] (+)= bias [n] + the sum over pairs of op(A) op(B). No bias with a step size.
template <typename storage_t>
struct Product {
  Form form;
  int64_t m, n, k;
  Array<storage_t> c;
  StoreMode<storage_t> into = {};
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

// C (+)= bias [O] + the sum over pairs of one of the three maps, of `examples` images. A pair is
// (x, w), (dz, w) or (dz, x); C is z, dx or dw. For z also column_moments() over the batch, if
// wanted.
template <typename storage_t>
struct Convolution {
  ConvShape shape;
  MapTo to;
  int64_t examples;
  Array<storage_t> c;
  StoreMode<storage_t> into = {};
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

// Term of column_sums().
template <typename number_t>
struct Two {
  number_t first, second;

  FASTMETA_HOST_DEVICE Two operator+(const Two& other) const {
    return {first + other.first, second + other.second};
  }
};

struct NoFinish {
  template <typename Accessor>
  FASTMETA_HOST_DEVICE void operator()(const Accessor&) const {}
};

// Update that leaves the gradient of a parameter unused.
struct NoUpdate {
  FASTMETA_HOST_DEVICE NoFinish from(int64_t) const { return {}; }
};

}  // namespace fastmeta
