// Adapts a classifier to many few-shot tasks at once, and meta-learns its step sizes, from C++.
//
//   cmake -S . -B build -DCMAKE_PREFIX_PATH="<where fastmeta is installed>;<libtorch>"
//   cmake --build build && build/adapt_tasks
//
// A frozen embedding (here a random projection), and on top of it a linear head that takes K steps
// of gradient descent on each task's support: the inner loop of ANIL.
#include <ATen/ATen.h>
#include <fastmeta/fastmeta.h>

#include <cstdio>
#include <cstdlib>

using at::Tensor;

constexpr int64_t kTasks = 100, kWays = 5, kShots = 5, kQueries = 15, kSteps = 5;
constexpr int64_t kPixels = 64, kFeatures = 128;

struct Tasks {
  Tensor support_x, support_y, query_x, query_y;  // [T, S, D], [T, S], [T, Q, D], [T, Q]
};

// Examples of a task: a centre for each class, and noise around it.
Tasks sample(const Tensor& projection) {
  const auto centres = at::randn({kTasks, kWays, 1, kPixels});
  const auto draw = [&](int64_t shots) {
    const auto noise = at::randn({kTasks, kWays, shots, kPixels});
    return at::relu(
        (centres + 1.5 * noise).reshape({kTasks, kWays * shots, kPixels}).matmul(projection));
  };
  const auto labels = [](int64_t shots) {
    return at::arange(kWays).repeat_interleave(shots).expand({kTasks, kWays * shots}).contiguous();
  };
  return {draw(kShots), labels(kShots), draw(kQueries), labels(kQueries)};
}

double accuracy(const Tensor& scores, const Tensor& labels) {
  return 100 * scores.argmax(-1).eq(labels).to(at::kDouble).mean().item<double>();
}

Tensor outputs(const fastmeta::AdaptedHead& head, const Tensor& x) {
  return x.matmul(head.weight.mT()) + head.bias.unsqueeze(1);
}

double difference(const Tensor& a, const Tensor& b) { return (a - b).abs().max().item<double>(); }

void require(bool condition, const char* claim) {
  if (condition) return;
  std::fprintf(stderr, "adapt_tasks: it does not hold that %s\n", claim);
  std::exit(1);
}

// What linear_head does, a step at a time: gradients in plain ATen, the update by inner_update.
Tensor adapted_by_hand(const Tasks& tasks, Tensor weight, Tensor bias, double lr) {
  const auto wanted = at::one_hot(tasks.support_y, kWays).to(at::kFloat);
  for (int64_t k = 0; k < kSteps; ++k) {
    const auto scores = tasks.support_x.matmul(weight.mT()) + bias.unsqueeze(1);
    const auto residuals = (scores.softmax(-1) - wanted) / static_cast<double>(wanted.size(1));
    const auto gradient = residuals.mT().matmul(tasks.support_x);
    weight = fastmeta::inner_update(weight.flatten(1), gradient.flatten(1), lr).view_as(weight);
    bias = fastmeta::inner_update(bias, residuals.sum(1), lr);
  }
  return weight;
}

int main() {
  at::manual_seed(0);
  const auto projection = at::randn({kPixels, kFeatures}) / 8;
  const auto tasks = sample(projection), unseen = sample(projection);
  const auto weight = at::zeros({kTasks, kWays, kFeatures}), bias = at::zeros({kTasks, kWays});
  auto lr = at::full({kTasks, kSteps}, 0.01);
  std::printf("%ld tasks, %ld ways, %ld shots; kernels for %s\n", long{kTasks}, long{kWays},
              long{kShots}, std::string(fastmeta::isa()).c_str());

  const auto adapt = [&](const Tasks& t) {
    return fastmeta::linear_head(t.support_x, t.support_y, weight, bias, lr);
  };
  const auto head = adapt(unseen);
  const double before = accuracy(outputs({weight, bias, {}, {}}, unseen.query_x), unseen.query_y);
  const double adapted = accuracy(outputs(head, unseen.query_x), unseen.query_y);
  std::printf("accuracy before adaptation            %5.1f %%\n", before);
  std::printf("after %ld steps of size 0.01            %5.1f %%\n", long{kSteps}, adapted);
  require(adapted > before + 20, "adaptation helps");

  // Meta-training: the gradient of the query loss to the step sizes, which all tasks share.
  double loss = 0;
  for (int i = 0; i < 50; ++i) {
    const auto step = fastmeta::linear_head_loss(tasks.support_x, tasks.support_y, weight, bias, lr,
                                                 tasks.query_x, tasks.query_y);
    loss = step.loss.mean().item<double>();
    if (i == 0) std::printf("meta-training: query loss %.3f", loss);
    lr = lr - 0.02 * step.grad.lr.sum(0, true);
  }
  std::printf(" -> %.3f\n", loss);
  const double learned = accuracy(outputs(adapt(unseen), unseen.query_x), unseen.query_y);
  std::printf("after %ld steps of the learned sizes    %5.1f %%\n", long{kSteps}, learned);
  require(learned > adapted, "learned step sizes are better");

  // Prototypical networks' classifier on the same features.
  const auto prototypes = fastmeta::prototypes(unseen.support_x, unseen.support_y, kWays);
  const auto distance = fastmeta::pairwise_distance(unseen.query_x, prototypes);
  std::printf("nearest prototype                     %5.1f %%\n",
              accuracy(-distance, unseen.query_y));

  const auto means = unseen.support_x.view({kTasks, kWays, kShots, kFeatures}).mean(2);
  require(difference(prototypes, means) < 1e-5, "prototypes are the classes' means");
  require(difference(distance, at::cdist(unseen.query_x, means, 2, 2).square()) < 1e-3,
          "distances equal the results of ATen");
  const auto by_hand = adapted_by_hand(unseen, weight, bias, 0.01);
  require(difference(head.weight, by_hand) < 1e-5, "the head is what single steps make of it");
  std::printf("All agrees with plain ATen.\n");
}
