// Few-shot tasks in plain arrays, and the loss of prototypical networks on them, from the formulas
// that fastmeta's kernels share. No torch.
#pragma once

#include <fastmeta/kernels/pairwise_distance/pairwise_distance.h>
#include <fastmeta/kernels/prototype_loss/prototype_loss.h>
#include <fastmeta/kernels/prototypes/prototypes.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

constexpr int64_t kTasks = 8, kWays = 5, kShots = 3, kQueries = 40, kFeatures = 16;
constexpr double kScale = 0.1;

using Floats = std::vector<float>;
using Labels = std::vector<int64_t>;

struct Examples {
  Floats x;       // [T, B, D]
  Labels labels;  // [T, B]
};

// A centre for each class of each task, and noise around it.
inline Floats class_centres(std::mt19937& random) {
  std::normal_distribution<float> normal;
  Floats centres(kTasks * kWays * kFeatures);
  for (float& value : centres) value = normal(random);
  return centres;
}

inline Examples draw(const Floats& centres, int64_t count, std::mt19937& random) {
  std::normal_distribution<float> noise(0, 1.5f);
  Examples drawn{Floats(kTasks * count * kFeatures), Labels(kTasks * count)};
  for (int64_t i = 0; i < kTasks * count; ++i) {
    drawn.labels[i] = i % count % kWays;
    const float* centre = &centres[(i / count * kWays + drawn.labels[i]) * kFeatures];
    for (int64_t d = 0; d < kFeatures; ++d) drawn.x[i * kFeatures + d] = centre[d] + noise(random);
  }
  return drawn;
}

// -scale times the squared distances of one query to a task's prototypes [N, D].
inline std::vector<double> scores(const float* query, const float* prototypes) {
  std::vector<double> found(kWays);
  for (int64_t n = 0; n < kWays; ++n) {
    double sum = 0;
    for (int64_t d = 0; d < kFeatures; ++d) {
      sum = fastmeta::DifferenceTerm::add(sum, double{query[d]},
                                          double{prototypes[n * kFeatures + d]});
    }
    found[n] = -kScale * fastmeta::finish(fastmeta::Metric::kSqeuclidean, sum);
  }
  return found;
}

inline double log_sum_exp(const std::vector<double>& values) {
  const double top = *std::max_element(values.begin(), values.end());
  double sum = 0;
  for (const double value : values) sum += std::exp(value - top);
  return top + std::log(sum);
}

// Mean loss of all examples, and where they have one in `gradient` [T, N, D], that to prototypes.
inline double mean_loss(const Examples& examples, const Floats& prototypes,
                        std::vector<double>* gradient = nullptr) {
  const auto total = static_cast<int64_t>(examples.labels.size());
  const double share = 1.0 / static_cast<double>(total);
  double loss = 0;
  for (int64_t i = 0; i < total; ++i) {
    const int64_t first = i / (total / kTasks) * kWays * kFeatures;
    const float* query = &examples.x[i * kFeatures];
    const auto values = scores(query, &prototypes[first]);
    const double normalizer = log_sum_exp(values);
    loss += share * (normalizer - values[examples.labels[i]]);
    if (gradient == nullptr) continue;
    for (int64_t n = 0; n < kWays; ++n) {
      const double upstream = fastmeta::distance_upstream(
          kScale, share, std::exp(values[n] - normalizer), n == examples.labels[i]);
      const double weight =
          fastmeta::gradient_weight(fastmeta::Metric::kSqeuclidean, upstream, -values[n] / kScale);
      for (int64_t d = 0; d < kFeatures; ++d) {
        const int64_t at = first + n * kFeatures + d;
        (*gradient)[at] += weight * (query[d] - prototypes[at]);
      }
    }
  }
  return loss;
}
