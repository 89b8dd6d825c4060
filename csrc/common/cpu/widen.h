// Accumulation type of CPU kernels, acc_t: float for bfloat16, half and float; double for double.
#pragma once

#include <ATen/OpMathType.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>

namespace fastmeta {

template <typename scalar_t>
using acc_t = at::opmath_type<scalar_t>;

template <typename scalar_t>
inline constexpr bool is_reduced = !std::is_same_v<scalar_t, acc_t<scalar_t>>;

// Workspace, not initialised.
template <typename value_t>
class Buffer {
 public:
  explicit Buffer(int64_t size) : data_(std::make_unique_for_overwrite<value_t[]>(size)) {}
  value_t* data() { return data_.get(); }
  const value_t* data() const { return data_.get(); }
  value_t& operator[](int64_t i) { return data_[i]; }
  const value_t& operator[](int64_t i) const { return data_[i]; }

 private:
  std::unique_ptr<value_t[]> data_;
};

// Returns `n` values as acc_t: the source itself if it has this type, else a converted copy in
// `scratch`.
template <typename scalar_t>
const acc_t<scalar_t>* widen(const scalar_t* source, acc_t<scalar_t>* scratch, int64_t n) {
  if constexpr (is_reduced<scalar_t>) {
    at::vec::convert(source, scratch, n);
    return scratch;
  } else {
    return source;
  }
}

template <typename scalar_t>
void narrow(const acc_t<scalar_t>* source, scalar_t* target, int64_t n) {
  if constexpr (is_reduced<scalar_t>) {
    at::vec::convert(source, target, n);
  } else {
    std::memcpy(target, source, n * sizeof(scalar_t));
  }
}

// Address for acc_t values bound for `target`: `target` itself, or scratch to narrow from.
template <typename scalar_t>
acc_t<scalar_t>* widened_target(scalar_t* target, acc_t<scalar_t>* scratch) {
  if constexpr (is_reduced<scalar_t>) {
    return scratch;
  } else {
    return target;
  }
}

}  // namespace fastmeta
