// Few-shot classification with plain arrays: no torch, only the formulas in fastmeta's headers.
//
//   cmake -S . -B build -DCMAKE_PREFIX_PATH=<where fastmeta is installed>
//   cmake --build build && build/nearest_prototype
//
// The prototypes start as the classes' means, and take steps of gradient descent on the task's own
// examples. The gradient is checked against differences of the loss.
#include <fastmeta/kernels/inner_update/inner_update.h>

#include <cstdio>

#include "episode.h"

Floats class_means(const Examples& support) {
  Floats means(kTasks * kWays * kFeatures);
  const int64_t count = kWays * kShots;
  for (int64_t i = 0; i < kTasks * count; ++i) {
    float* mean = &means[(i / count * kWays + support.labels[i]) * kFeatures];
    for (int64_t d = 0; d < kFeatures; ++d) mean[d] += support.x[i * kFeatures + d] / kShots;
  }
  return means;
}

double accuracy(const Examples& queries, const Floats& prototypes) {
  int64_t right = 0;
  for (int64_t i = 0; i < kTasks * kQueries; ++i) {
    const auto found =
        scores(&queries.x[i * kFeatures], &prototypes[i / kQueries * kWays * kFeatures]);
    right += std::max_element(found.begin(), found.end()) - found.begin() == queries.labels[i];
  }
  return 100.0 * static_cast<double>(right) / (kTasks * kQueries);
}

// The largest difference between the gradient and central differences of the loss, relative to the
// largest gradient.
double gradient_error(const Examples& examples, Floats prototypes) {
  std::vector<double> gradient(prototypes.size());
  mean_loss(examples, prototypes, &gradient);
  double error = 0, largest = 0;
  for (size_t i = 0; i < prototypes.size(); ++i) {
    const float kept = prototypes[i], up = kept + 0.01f, down = kept - 0.01f;
    prototypes[i] = up;
    const double above = mean_loss(examples, prototypes);
    prototypes[i] = down;
    const double below = mean_loss(examples, prototypes);
    prototypes[i] = kept;
    error = std::max(error, std::abs((above - below) / (double{up} - double{down}) - gradient[i]));
    largest = std::max(largest, std::abs(gradient[i]));
  }
  return error / largest;
}

int main() {
  std::mt19937 random(0);
  const Floats centres = class_centres(random);
  const Examples support = draw(centres, kWays * kShots, random);
  const Examples queries = draw(centres, kQueries, random);
  Floats prototypes = class_means(support);
  std::printf("means of the classes: loss of the support %.4f, accuracy on queries %.1f %%\n",
              mean_loss(support, prototypes), accuracy(queries, prototypes));

  const double error = gradient_error(support, prototypes), start = mean_loss(support, prototypes);
  for (int k = 0; k < 10; ++k) {
    std::vector<double> gradient(prototypes.size());
    mean_loss(support, prototypes, &gradient);
    for (size_t i = 0; i < prototypes.size(); ++i) {
      prototypes[i] = fastmeta::descend(prototypes[i], static_cast<float>(gradient[i]), 10.0f);
    }
  }
  const double end = mean_loss(support, prototypes);
  std::printf("after 10 steps:       loss of the support %.4f, accuracy on queries %.1f %%\n", end,
              accuracy(queries, prototypes));
  std::printf("relative error of the gradient %.1e\n", error);
  if (error < 1e-4 && end < start) return 0;
  std::fprintf(stderr, "nearest_prototype: the gradient is wrong, or the loss does not fall\n");
  return 1;
}
