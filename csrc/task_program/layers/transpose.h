// Transposes each example [rows, columns] to [columns, rows]: channels from the first to the last
// dimension, or back. Every pass is a transpose.
#pragma once

#include "task_program/program/network.h"

namespace fastmeta {

// Computes target [columns, rows] (+)= source' for source [rows, columns] of an example.
template <typename storage_t>
struct TransposeExample {
  int64_t rows, columns;
  Array<storage_t> source, target;
  bool adds;

  template <typename ThreadGroup>
  FASTMETA_HOST_DEVICE void operator()(const ThreadGroup& group, int64_t example) const {
    const int64_t begin = example * rows * columns;
    const bool by_rows = rows >= columns;  // the group shares the longer dimension
    for (int64_t i = 0; i < (by_rows ? columns : rows); ++i) {
      for (int64_t j = group.lane; j < (by_rows ? rows : columns); j += group.size) {
        const int64_t row = by_rows ? j : i, column = by_rows ? i : j;
        const int64_t place = begin + column * rows + row;
        const auto value = group.load(source, begin + row * columns + column);
        group.store(target, place, adds ? group.load(target, place) + value : value);
      }
    }
  }
};

template <typename storage_t>
struct TransposeLayer {
  const Network<storage_t>& net;
  const Instruction& i;

  template <typename Executor>
  FASTMETA_HOST_DEVICE void forward(Executor& exec) const {
    run(exec, net.value(i.x), net.value(i.y));
  }
  template <typename Executor>
  FASTMETA_HOST_DEVICE void tangent_forward(Executor& exec) const {
    run(exec, net.value_dot(i.x), net.value_dot(i.y));
  }
  template <typename Executor>
  FASTMETA_HOST_DEVICE void backward(Executor& exec, Array<storage_t> dy,
                                     Array<storage_t> dx) const {
    if (!dx) return;
    exec.rows(net.examples.count,
              TransposeExample<storage_t>{i.outputs, i.rows, dy, dx, i.adds_to_x});
  }

 private:
  template <typename Executor>
  FASTMETA_HOST_DEVICE void run(Executor& exec, Array<storage_t> x, Array<storage_t> y) const {
    exec.rows(net.examples.count, TransposeExample<storage_t>{i.rows, i.outputs, x, y, false});
  }
};

}  // namespace fastmeta
