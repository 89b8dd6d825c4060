// fastmeta in C++: the ops on at::Tensor, batched over tasks.
//
// T tasks, S support examples, Q queries, N ways (classes), D features, P parameters, K steps.
// float32, float64, bfloat16 and float16, the last two computed in float32: the "wide" dtype is
// float32 for them, else the inputs' own. Inputs are never modified, results are new tensors. The
// formulas stand in fastmeta/kernels/<op>/<op>.h; a metric is "sqeuclidean", "euclidean", "cosine"
// or "dot", a loss "cross_entropy", "logistic" or "mse".
//
// Autograd does not record these functions: they refuse a tensor that requires a gradient unless a
// c10::NoGradGuard (torch::NoGradGuard) is in force. Each `*_backward` is the derivative to call.
//
// Errors are c10::Error (ValueError and TypeError of it), and name the argument, what was expected
// and what came.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string_view>
#include <tuple>

#define FASTMETA_API __attribute__((visibility("default")))

namespace fastmeta {

// The vector instructions that the CPU kernels were compiled for: "avx512", "avx2" or "portable".
FASTMETA_API std::string_view isa();

// Gives back the memory that CPU kernels keep for their next calls: bytes. FASTMETA_WORKSPACE_MB,
// 1024 unless set, limits what each thread keeps.
FASTMETA_API int64_t release_memory();

// params - lr * grads: one step of gradient descent of every task.
//   params, grads [T, P]; lr [T or 1, P or 1], wide -> [T, P]
FASTMETA_API at::Tensor inner_update(const at::Tensor& params, const at::Tensor& grads,
                                     const at::Tensor& lr);
FASTMETA_API at::Tensor inner_update(const at::Tensor& params, const at::Tensor& grads, double lr);

//   grad_out, grads [T, P] -> grad_grads [T, P], grad_lr of lr's shape; grad_params is grad_out
FASTMETA_API std::tuple<at::Tensor, at::Tensor> inner_update_backward(const at::Tensor& grad_out,
                                                                      const at::Tensor& grads,
                                                                      const at::Tensor& lr);

// Mean embedding of each class; zero for a class without an example.
//   x [T, S, D], labels [T, S] int64 in [0, N) -> [T, N, D]
FASTMETA_API at::Tensor prototypes(const at::Tensor& x, const at::Tensor& labels, int64_t classes);

//   grad_prototypes [T, N, D] -> grad_x [T, S, D]
FASTMETA_API at::Tensor prototypes_backward(const at::Tensor& grad_prototypes,
                                            const at::Tensor& labels);

// Distances between all rows; smaller is nearer, "dot" is the negated product.
//   x [T, Q, D], y [T, N, D] -> [T, Q, N]
FASTMETA_API at::Tensor pairwise_distance(const at::Tensor& x, const at::Tensor& y,
                                          std::string_view metric = "sqeuclidean");

//   grad_distance [T, Q, N] -> grad_x, grad_y
FASTMETA_API std::tuple<at::Tensor, at::Tensor> pairwise_distance_backward(
    const at::Tensor& grad_distance, const at::Tensor& x, const at::Tensor& y,
    std::string_view metric = "sqeuclidean");

// The k nearest rows of y to each row of x, nearest first; ties in the order of indices, NaN last.
//   x [T, Q, D], y [T, N, D], present [T, N] bool or all -> distances, indices [T, Q, k]; index -1
//   and an infinite distance where fewer than k are present
FASTMETA_API std::tuple<at::Tensor, at::Tensor> nearest(
    const at::Tensor& x, const at::Tensor& y, int64_t k = 1,
    std::string_view metric = "sqeuclidean", const std::optional<at::Tensor>& present = {});

// Each query's cross entropy of softmax(-scale distance to the prototypes).
//   query [T, Q, D], labels [T, Q] int64 in [0, N), prototypes [T, N, D] -> loss [T, Q], wide
FASTMETA_API at::Tensor prototype_loss(const at::Tensor& query, const at::Tensor& labels,
                                       const at::Tensor& prototypes,
                                       std::string_view metric = "sqeuclidean", double scale = 1);

// The loss, and the gradient of sum(weight * loss) in the same pass.
//   weight [T, Q], wide -> loss [T, Q], grad_query, grad_prototypes
FASTMETA_API std::tuple<at::Tensor, at::Tensor, at::Tensor> prototype_loss_backward(
    const at::Tensor& weight, const at::Tensor& query, const at::Tensor& labels,
    const at::Tensor& prototypes, std::string_view metric = "sqeuclidean", double scale = 1);

struct HeadOptions {
  std::string_view loss = "cross_entropy";
  double weight_decay = 0;
  // Steps on coefficients of the examples, in O(S^2 N) whatever D is, instead of on the weights, in
  // O(S N D): the same result but for rounding.
  bool dual = true;
};

struct HeadGradientOptions {
  bool first_order = false;  // skip second derivatives: x, targets get no gradient
  bool input_grad = true;    // compute the gradients of x and of the queries
};

// A linear head after K steps of gradient descent on its task's examples. An absent bias is an
// empty tensor (last dimension 0).
struct AdaptedHead {
  at::Tensor weight;                 // [T, N, D]
  at::Tensor bias;                   // [T, N]
  at::Tensor predictions, products;  // linear_head_backward reads them
};

//   x [T, S, D]; targets [T, S] int64 labels, or for "mse" [T, S, N]; weight [T, N, D], bias [T, N]
//   the start; lr [T, K], wide
FASTMETA_API AdaptedHead linear_head(const at::Tensor& x, const at::Tensor& targets,
                                     const at::Tensor& weight,
                                     const std::optional<at::Tensor>& bias, const at::Tensor& lr,
                                     const HeadOptions& options = {});

// Gradients, each of the shape of its input. An absent gradient is an empty tensor (last dimension
// 0).
struct HeadDerivatives {
  at::Tensor x, targets, weight, bias, lr;
};

//   grad_weight [T, N, D], grad_bias [T, N] or [T, 0]; the rest as given to linear_head
FASTMETA_API HeadDerivatives linear_head_backward(
    const at::Tensor& grad_weight, const at::Tensor& grad_bias, const AdaptedHead& adapted,
    const at::Tensor& x, const at::Tensor& targets, const at::Tensor& weight,
    const std::optional<at::Tensor>& bias, const at::Tensor& lr, const HeadOptions& options = {},
    const HeadGradientOptions& gradient_options = {});

struct HeadMetaLoss {
  at::Tensor loss;       // [T], each task's mean over its queries
  at::Tensor outputs;    // adapted head's outputs at the queries [T, Q, N]
  HeadDerivatives grad;  // gradients of the mean of `loss` over tasks
  at::Tensor grad_query, grad_query_targets;
};

// Adapts the head, takes its mean loss on queries, and all gradients of this loss: the whole
// meta-step of ANIL in one call. CPU only.
// query [T, Q, D], query_targets [T, Q] or [T, Q, N]
FASTMETA_API HeadMetaLoss linear_head_loss(const at::Tensor& x, const at::Tensor& targets,
                                           const at::Tensor& weight,
                                           const std::optional<at::Tensor>& bias,
                                           const at::Tensor& lr, const at::Tensor& query,
                                           const at::Tensor& query_targets,
                                           const HeadOptions& options = {},
                                           const HeadGradientOptions& gradient_options = {});

}  // namespace fastmeta
