// Steps of the grid executor, for test_grid_steps.py.
#include <string_view>

#include "convolution/cuda/convolution_kernel.cuh"
#include "task_program/cuda/grid_executor.cuh"

namespace fastmeta {
namespace {

// A number that tells positions apart.
template <typename Accessor>
__device__ auto code_of(const Accessor& at) {
  return static_cast<typename Accessor::number_t>(at.image + 10 * at.h + 100 * at.w);
}

template <typename value_t>
struct AddCode {
  Images images;
  Array<value_t> x, target;

  __device__ void operator()(const GlobalImageAccessor<value_t>& at) const {
    const int64_t place = images.place(at.image, at.h, at.w);
    at.store(target, place, at.load(x, place) + code_of(at));
  }
};

template <typename value_t>
struct WithCode {
  Images images;
  Array<value_t> x;

  __device__ Two<value_t> operator()(const GlobalImageAccessor<value_t>& at) const {
    const value_t number = at.load(x, images.place(at.image, at.h, at.w));
    return {number, number * code_of(at)};
  }
};

template <typename value_t>
struct Halve {
  Array<value_t> source, target;

  __device__ void operator()(const GlobalAccessor<value_t>& at) const {
    at.store(target, at.load(source) / 2);
  }
};

template <typename value_t>
int step_of_images(std::string_view step, int64_t tasks, const Images& images, bool whole_batch,
                   value_t* x, value_t* target, value_t* parts) {
  GridExecutor<value_t> executor(tasks, parts, nullptr, {});
  const int64_t elements = images.positions() * images.channels;
  const int64_t sums = (whole_batch ? 1 : images.count) * 4 * images.channels;
  const Array<value_t> in{x, elements}, of_elements{target, elements}, of_channels{target, sums};
  if (step == "table") executor.table(images, AddCode<value_t>{images, in, of_elements});
  if (step == "column_sums") {
    executor.column_sums(images, whole_batch, WithCode<value_t>{images, in}, of_channels);
  }
  if (step == "column_moments") executor.column_moments(images, whole_batch, in, of_channels);
  return executor.error();
}

// Arrays of tasks that follow one another: a, b, a2, b2 (pairs), then bias and the step size, null
// where there is none, C, half of C, and moments or null.
template <typename value_t>
int step_of_convolution(const ConvShape& shape, MapTo to, int64_t tasks, int64_t examples,
                        bool adds, bool tf32, value_t* const* arrays, value_t* parts) {
  const int64_t z = examples * shape.out_positions() * shape.outputs;
  const int64_t x = examples * shape.in_positions() * shape.channels, w = shape.weight_size();
  const int64_t a = to == MapTo::kOutput ? x : z, b = to == MapTo::kWeight ? x : w;
  Convolution<value_t> c{shape, to, examples, {}};
  c.c = {arrays[6], c.size()};
  c.into.adds = adds;
  if (arrays[4] != nullptr) c.bias = {arrays[4], shape.outputs};
  if (arrays[5] != nullptr) c.into.step_size = {arrays[5], 1};
  c.add({arrays[0], a}, {arrays[1], b});
  if (arrays[2] != nullptr) c.add({arrays[2], a}, {arrays[3], b});
  if (arrays[8] != nullptr) c.moments = {arrays[8], 4 * shape.outputs};
  GridExecutor<value_t> executor(tasks, parts, nullptr, {.convolutions = tf32});
  executor.convolution(c, Halve<value_t>{c.c, {arrays[7], c.size()}});
  return executor.error();
}

ConvShape shape_of(const int64_t* s) {
  return {s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9], s[10], s[11], s[12]};
}

}  // namespace
}  // namespace fastmeta

using namespace fastmeta;

extern "C" int64_t part_numbers() { return GridExecutor<double>::part_numbers(); }

extern "C" int run_image_step(const char* step, bool is_float, int64_t tasks, const int64_t* sizes,
                              bool whole_batch, void* x, void* target, void* parts) {
  const Images images{sizes[0], sizes[1], sizes[2], sizes[3]};
  const auto run = [&]<typename value_t>(value_t*) {
    return step_of_images(step, tasks, images, whole_batch, static_cast<value_t*>(x),
                          static_cast<value_t*>(target), static_cast<value_t*>(parts));
  };
  return is_float ? run(static_cast<float*>(nullptr)) : run(static_cast<double*>(nullptr));
}

extern "C" int run_convolution(int to, bool is_float, int64_t tasks, int64_t examples, bool adds,
                               bool tf32, const int64_t* shape, void* const* arrays, void* parts) {
  const auto run = [&]<typename value_t>(value_t*) {
    value_t* typed[9];
    for (int i = 0; i < 9; ++i) typed[i] = static_cast<value_t*>(arrays[i]);
    return step_of_convolution(shape_of(shape), static_cast<MapTo>(to), tasks, examples, adds, tf32,
                               typed, static_cast<value_t*>(parts));
  };
  return is_float ? run(static_cast<float*>(nullptr)) : run(static_cast<double*>(nullptr));
}
