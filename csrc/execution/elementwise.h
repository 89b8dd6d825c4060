// Elementwise steps that several layers need.
#pragma once

#include "execution/executor.h"

namespace fastmeta {

template <typename storage_t>
struct Fill {
  double value;
  Array<storage_t> target;

  template <typename Accessor>
  FASTMETA_HOST_DEVICE void operator()(const Accessor& at) const {
    at.store(target, typename Accessor::number_t(value));
  }
};

template <typename storage_t>
struct Copy {
  Array<storage_t> source, target;
  bool adds = false;

  template <typename Accessor>
  FASTMETA_HOST_DEVICE void operator()(const Accessor& at) const {
    const auto value = at.load(source);
    at.store(target, adds ? at.load(target) + value : value);
  }
};

template <typename storage_t>
struct Sum {
  Array<storage_t> a, b, target;

  template <typename Accessor>
  FASTMETA_HOST_DEVICE void operator()(const Accessor& at) const {
    at.store(target, at.load(a) + at.load(b));
  }
};

template <typename storage_t, typename Accessor>
FASTMETA_HOST_DEVICE void store_sum(const Accessor& at, const Array<storage_t>& target,
                                    const StoreMode<storage_t>& into,
                                    typename Accessor::number_t sum) {
  if (into.step_size) {
    sum = at.load(target) - at.load_one(into.step_size, 0) * sum;
  } else if (into.adds) {
    sum = at.load(target) + sum;
  }
  at.store(target, sum);
}

// Computes target[j] (+)= sum over rows of source[row, j], then finish; an accessor is a column.
template <typename storage_t, typename Finish = NoFinish>
struct ColumnSums {
  int64_t rows, columns;
  Array<storage_t> source, target;
  StoreMode<storage_t> into;
  Finish finish = {};

  template <typename Accessor>
  FASTMETA_HOST_DEVICE void operator()(const Accessor& at) const {
    typename Accessor::number_t sum(0);
    for (int64_t r = 0; r < rows; ++r) sum = sum + at.load(source, r * columns);
    store_sum(at, target, into, sum);
    finish(at);
  }
};

// Term of reduce(): x norm[0] weight.
template <typename storage_t>
struct WeightedElement {
  Array<storage_t> x, norm;
  double weight;

  template <typename Accessor>
  FASTMETA_HOST_DEVICE auto operator()(const Accessor& at) const {
    using number_t = typename Accessor::number_t;
    return at.load(x) * (at.load_one(norm, 0) * number_t(weight));
  }
};

template <typename storage_t>
struct NegativeProduct {
  Array<storage_t> a, b;

  template <typename Accessor>
  FASTMETA_HOST_DEVICE auto operator()(const Accessor& at) const {
    return typename Accessor::number_t(0) - at.load(a) * at.load(b);
  }
};

}  // namespace fastmeta
