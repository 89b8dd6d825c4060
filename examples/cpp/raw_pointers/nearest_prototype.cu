// Few-shot classification on a GPU with raw device pointers: fastmeta's CUDA kernels, no torch.
//
//   cmake -S . -B build -DCMAKE_PREFIX_PATH=<where fastmeta is installed>
//   cmake --build build && build/nearest_prototype_cuda
//
// The prototypes start as the classes' means, and take steps of gradient descent on the task's own
// examples; the loss is checked against the CPU's. Exit status 77 without a GPU.
#include <cuda_runtime.h>
#include <fastmeta/kernels/inner_update/inner_update.h>

#include <cstdio>
#include <cstdlib>
#include <utility>

#include "episode.h"

void check(int error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "nearest_prototype_cuda: %s\n",
               cudaGetErrorString(static_cast<cudaError_t>(error)));
  std::exit(1);
}

// An array in the GPU's memory.
template <typename value_t>
class Device {
 public:
  explicit Device(size_t size) : size_(size) { check(cudaMalloc(&data_, size * sizeof(value_t))); }
  explicit Device(const std::vector<value_t>& values) : Device(values.size()) {
    check(cudaMemcpy(data_, values.data(), size_ * sizeof(value_t), cudaMemcpyHostToDevice));
  }
  ~Device() { cudaFree(data_); }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  value_t* get() { return data_; }
  void swap(Device& other) { std::swap(data_, other.data_); }
  std::vector<value_t> read() const {
    std::vector<value_t> values(size_);
    check(cudaMemcpy(values.data(), data_, size_ * sizeof(value_t), cudaMemcpyDeviceToHost));
    return values;
  }

 private:
  size_t size_;
  value_t* data_ = nullptr;
};

double mean(const Floats& values) {
  double sum = 0;
  for (const float value : values) sum += value;
  return sum / static_cast<double>(values.size());
}

int main() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::fprintf(stderr, "nearest_prototype_cuda: there is no GPU\n");
    return 77;
  }
  constexpr auto kFloat = fastmeta::Dtype::kFloat;
  constexpr int64_t kSupport = kWays * kShots, kRow = kWays * kFeatures;
  std::mt19937 random(0);
  const Floats centres = class_centres(random);
  const Examples support = draw(centres, kSupport, random);

  Device<float> x(support.x), prototypes(kTasks * kRow), updated(kTasks * kRow);
  Device<int64_t> labels(support.labels);
  check(fastmeta::launch_prototypes(kFloat, {kTasks, kSupport, kWays, kFeatures}, x.get(),
                                    labels.get(), prototypes.get(), nullptr));
  const double start = mean_loss(support, prototypes.read());

  fastmeta::LossOperands operands{{kFloat,
                                   fastmeta::Metric::kSqeuclidean,
                                   {kTasks, kSupport, kWays, kFeatures},
                                   x.get(),
                                   prototypes.get()},
                                  labels.get(),
                                  kScale};
  Device<char> workspace(fastmeta::prototype_loss_backward_workspace(operands));
  Device<float> weight(Floats(kTasks * kSupport, 1.0f / (kTasks * kSupport)));
  Device<float> loss(kTasks * kSupport), grad_x(support.x.size()), gradient(kTasks * kRow);
  Device<float> lr(Floats{10.0f});
  const fastmeta::InnerUpdateShape update{kTasks, kRow, kRow, kRow, 0, 0};
  for (int k = 0; k < 10; ++k) {
    check(fastmeta::launch_prototype_loss_backward(operands, weight.get(), loss.get(), grad_x.get(),
                                                   gradient.get(), workspace.get(), nullptr));
    if (k == 0 && std::abs(mean(loss.read()) - start) > 1e-4 * start) {
      std::fprintf(stderr, "nearest_prototype_cuda: the loss is not the CPU's\n");
      return 1;
    }
    check(fastmeta::launch_inner_update(kFloat, update, prototypes.get(), gradient.get(), lr.get(),
                                        updated.get(), nullptr));
    prototypes.swap(updated);
    operands.pairwise.y = prototypes.get();
  }
  const double end = mean_loss(support, prototypes.read());
  std::printf("loss of the support %.4f, after 10 steps %.4f\n", start, end);
  return end < start ? 0 : 1;
}
