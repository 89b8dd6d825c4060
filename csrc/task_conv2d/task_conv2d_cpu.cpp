// CPU implementation of convolution: a thread a task, or all threads on one task if tasks are few.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>

#include "common/cpu/parallel.h"
#include "common/cpu/widen.h"
#include "common/cpu/workspace.h"
#include "convolution/cpu/convolution.h"
#include "task_conv2d/task_conv2d_ops.h"

namespace fastmeta {
namespace {

template <typename scalar_t>
scalar_t* at_task(const TaskArray& array, int64_t task) {
  return static_cast<scalar_t*>(array.data) + task * array.stride;
}

// Arrays of one task, in the accumulation type.
template <typename value_t>
struct OneTask {
  value_t *outputs, *inputs, *weights, *bias;
};

template <typename scalar_t>
OneTask<scalar_t> one_task(const TaskConvCall& call, int64_t task) {
  return {at_task<scalar_t>(call.outputs, task), at_task<scalar_t>(call.inputs, task),
          at_task<scalar_t>(call.weights, task), at_task<scalar_t>(call.bias, task)};
}

template <typename value_t>
void run_map(MapTo to, const CpuConvolution<value_t>& convolution, const OneTask<value_t>& task,
             value_t* scratch) {
  const ConvPair<value_t> to_output{task.inputs, task.weights};
  const ConvPair<value_t> to_input{task.outputs, task.weights};
  const ConvPair<value_t> to_weight{task.outputs, task.inputs};
  switch (to) {
    case MapTo::kOutput:
      return convolution.output({&to_output, 1}, task.outputs, task.bias, false, scratch);
    case MapTo::kInput:
      return convolution.input({&to_input, 1}, task.inputs, false, scratch);
    case MapTo::kWeight:
      return convolution.weight({&to_weight, 1}, task.weights, false, 1, scratch);
  }
}

template <typename from_t, typename to_t>
void convert(const from_t* source, to_t* target, int64_t count) {
  parallel_for(0, count, kGrain, [&](int64_t begin, int64_t end) {
    at::vec::convert(source + begin, target + begin, end - begin);
  });
}

// Arrays of one task: half types as copies in float32, others in place.
template <typename scalar_t>
class WideTask {
 public:
  using value_t = acc_t<scalar_t>;

  explicit WideTask(const TaskConvCall& call)
      : to_(call.to),
        outputs_(call.examples * call.shape.out_positions() * call.shape.outputs),
        inputs_(call.examples * call.shape.in_positions() * call.shape.channels),
        weights_(call.shape.weight_size()),
        biases_(call.bias.data == nullptr ? 0 : call.shape.outputs) {}

  int64_t scratch() const {
    return is_reduced<scalar_t> ? outputs_ + inputs_ + weights_ + biases_ : 0;
  }

  OneTask<value_t> widened(const OneTask<scalar_t>& task, value_t* scratch) const {
    if constexpr (is_reduced<scalar_t>) {
      value_t *x = scratch + outputs_, *w = x + inputs_, *bias = w + weights_;
      // The map's own result is not read, so it is not converted.
      if (to_ != MapTo::kOutput) convert(task.outputs, scratch, outputs_);
      if (to_ != MapTo::kInput) convert(task.inputs, x, inputs_);
      if (to_ != MapTo::kWeight) convert(task.weights, w, weights_);
      convert(task.bias, bias, biases_);
      return {scratch, x, w, biases_ == 0 ? nullptr : bias};
    } else {
      return task;
    }
  }

  void round(const OneTask<value_t>& wide, const OneTask<scalar_t>& task) const {
    if constexpr (is_reduced<scalar_t>) {
      if (to_ == MapTo::kOutput) convert(wide.outputs, task.outputs, outputs_);
      if (to_ == MapTo::kInput) convert(wide.inputs, task.inputs, inputs_);
      if (to_ == MapTo::kWeight) convert(wide.weights, task.weights, weights_);
    }
  }

 private:
  MapTo to_;
  int64_t outputs_, inputs_, weights_, biases_;
};

template <typename scalar_t>
void run_as(const TaskConvCall& call) {
  using value_t = acc_t<scalar_t>;
  const int64_t threads = thread_count();
  // As for_each_task_range() decides: with fewer tasks than threads it calls once, for all.
  const bool shares_threads = call.tasks < threads;
  const WideTask<scalar_t> copies(call);
  for_each_task_range(call.tasks, [&](int64_t begin, int64_t end) {
    const CpuConvolution<value_t> convolution(call.shape, call.examples, shares_threads);
    const int64_t elements = convolution.scratch(call.shape) * (shares_threads ? threads : 1);
    const auto memory =
        workspace((copies.scratch() + elements) * static_cast<int64_t>(sizeof(value_t)));
    auto* scratch = static_cast<value_t*>(memory.mutable_data_ptr());
    for (int64_t t = begin; t < end; ++t) {
      const auto task = one_task<scalar_t>(call, t);
      const auto wide = copies.widened(task, scratch + elements);
      run_map(call.to, convolution, wide, scratch);
      copies.round(wide, task);
    }
  });
}

// Transposes each image's matrix [rows, columns], in blocks that fit the registers.
void transpose_images(const at::Tensor& from, int64_t rows, int64_t columns, at::Tensor& to) {
  const auto transpose_as = [&]<typename scalar_t>(scalar_t* target) {
    const auto* source = from.const_data_ptr<scalar_t>();
    parallel_for(0, from.size(0) * from.size(1), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * rows * columns; i < end * rows * columns; i += rows * columns) {
        transpose(rows, columns, source + i, columns, target + i, rows);
      }
    });
  };
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, from.scalar_type(), "task_conv2d",
                                  [&] { transpose_as(to.mutable_data_ptr<scalar_t>()); });
}

struct OnCpu {
  static void check_size(const ConvShape&) {}  // it counts in 64 bits

  static at::Tensor channels_last(const at::Tensor& x) {
    // Images that are channels-last already need no copy.
    if (!x.is_contiguous() || x.numel() == 0) return fastmeta::channels_last(x);
    auto turned = at::empty({x.size(0), x.size(1), x.size(3), x.size(4), x.size(2)}, x.options());
    transpose_images(x, x.size(2), x.size(3) * x.size(4), turned);
    return turned;
  }

  static at::Tensor channels_first(const at::Tensor& x) {
    auto turned = at::empty({x.size(0), x.size(1), x.size(4), x.size(2), x.size(3)}, x.options());
    if (x.numel() > 0) transpose_images(x, x.size(2) * x.size(3), x.size(4), turned);
    return turned;
  }

  static void run(const TaskConvCall& call, const at::Tensor& like) {
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, like.scalar_type(), "task_conv2d",
                                    [&] { run_as<scalar_t>(call); });
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(fastmeta, CPU, m) { register_task_conv<OnCpu>(m); }

}  // namespace fastmeta
