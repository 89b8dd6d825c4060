// What the record of launches tells of a kernel's arguments: words "name=number ".
#pragma once

#include <cstdint>
#include <string>

namespace emulator {

template <typename value_t>
std::string fact(const char* name, value_t value) {
  return std::string(name) + "=" + std::to_string(static_cast<int64_t>(value)) + " ";
}

// Whether each task's part of an array begins where 16 bytes do.
template <typename Array>
bool is_aligned(const Array& array) {
  constexpr size_t kBytes = 16;
  return reinterpret_cast<uintptr_t>(array.data) % kBytes == 0 &&
         array.task_stride * sizeof(*array.data) % kBytes == 0;
}

// Of the arguments of convolution_kernel its product, and whether it reads images and writes rows
// several numbers at a time; of other arguments nothing.
template <typename Argument>
std::string facts_of(const Argument& argument) {
  if constexpr (requires { argument.g.p.m, argument.sizes.channels, argument.wide; }) {
    const auto& p = argument.g.p;
    return fact("m", p.m) + fact("n", p.n) + fact("k", p.k) + fact("pairs", p.pairs) +
           fact("splits", argument.g.splits) + fact("channels", argument.sizes.channels) +
           fact("outputs", argument.sizes.outputs) + fact("wide", argument.wide) +
           fact("aligned_target",
                argument.g.splits > 1 ? is_aligned(argument.g.parts) : is_aligned(p.c));
  }
  return {};
}

}  // namespace emulator
