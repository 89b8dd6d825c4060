// Elementwise steps that several layers need.
#pragma once

#include "task_program/executor.h"

namespace fastmeta {

template <typename storage_t>
struct Fill {
  double value;
  Array<storage_t> target;

  template <typename Cell>
  FASTMETA_HOST_DEVICE void operator()(const Cell& at) const {
    at.store(target, typename Cell::number_t(value));
  }
};

template <typename storage_t>
struct Copy {
  Array<storage_t> source, target;
  bool adds = false;

  template <typename Cell>
  FASTMETA_HOST_DEVICE void operator()(const Cell& at) const {
    const auto value = at.load(source);
    at.store(target, adds ? at.load(target) + value : value);
  }
};

template <typename storage_t>
struct Sum {
  Array<storage_t> a, b, target;

  template <typename Cell>
  FASTMETA_HOST_DEVICE void operator()(const Cell& at) const {
    at.store(target, at.load(a) + at.load(b));
  }
};

// target[j] (+)= sum over rows of source[row, j], then finish; a cell is a column.
template <typename storage_t, typename Finish = NoFinish>
struct ColumnSums {
  int64_t rows, columns;
  Array<storage_t> source, target;
  bool adds;
  Finish finish = {};

  template <typename Cell>
  FASTMETA_HOST_DEVICE void operator()(const Cell& at) const {
    using number_t = typename Cell::number_t;
    auto sum = adds ? at.load(target) : number_t(0);
    for (int64_t r = 0; r < rows; ++r) sum = sum + at.load(source, r * columns);
    at.store(target, sum);
    finish(at);
  }
};

// What reduce() sums: x norm[0] weight.
template <typename storage_t>
struct WeightedElement {
  Array<storage_t> x, norm;
  double weight;

  template <typename Cell>
  FASTMETA_HOST_DEVICE auto operator()(const Cell& at) const {
    using number_t = typename Cell::number_t;
    return at.load(x) * (at.load_one(norm, 0) * number_t(weight));
  }
};

template <typename storage_t>
struct NegativeProduct {
  Array<storage_t> a, b;

  template <typename Cell>
  FASTMETA_HOST_DEVICE auto operator()(const Cell& at) const {
    return typename Cell::number_t(0) - at.load(a) * at.load(b);
  }
};

}  // namespace fastmeta
