// Schemas of every op of fastmeta, on one page.
// T tasks, S support examples, Q queries, N ways, D features, P parameters; formulas in
// <op>/<op>.h.
#include <torch/library.h>

TORCH_LIBRARY(fastmeta, m) {
  // params, grads [T, P]; lr [T or 1, P or 1], float32 for bfloat16 and float16 -> [T, P]
  m.def("inner_update(Tensor params, Tensor grads, Tensor lr) -> Tensor");
  m.def(
      "inner_update_backward(Tensor grad_out, Tensor grads, Tensor lr)"
      " -> (Tensor grad_grads, Tensor grad_lr)");

  // x [T, S, D], labels [T, S] -> [T, N, D]; and its transpose
  m.def("prototypes(Tensor x, Tensor labels, int num_classes) -> Tensor");
  m.def("prototypes_backward(Tensor grad_prototypes, Tensor labels) -> Tensor");

  // x [T, Q, D], y [T, N, D] -> [T, Q, N]
  m.def("pairwise_distance(Tensor x, Tensor y, str metric) -> Tensor");
  m.def(
      "pairwise_distance_backward(Tensor grad_distance, Tensor x, Tensor y, str metric)"
      " -> (Tensor grad_x, Tensor grad_y)");

  // x [T, Q, H], y [T, N, H], weight [T, H], bias [T] -> scores [T, Q, N]; its gradient; its tangent;
  // and the tangent of its gradient to x, y and weight at a constant grad_scores, see
  // pair_scores/pair_scores.h. weight and bias are float32 for bfloat16 and float16.
  m.def("pair_scores(Tensor x, Tensor y, Tensor weight, Tensor bias, str activation) -> Tensor");
  m.def(
      "pair_scores_backward(Tensor grad_scores, Tensor x, Tensor y, Tensor weight, str activation)"
      " -> (Tensor grad_x, Tensor grad_y, Tensor grad_weight, Tensor grad_bias)");
  m.def(
      "pair_scores_tangent(Tensor x_dot, Tensor y_dot, Tensor weight_dot, Tensor bias_dot, Tensor "
      "x,"
      " Tensor y, Tensor weight, str activation) -> Tensor");
  m.def(
      "pair_scores_bend(Tensor grad_scores, Tensor x_dot, Tensor y_dot, Tensor weight_dot, Tensor "
      "x,"
      " Tensor y, Tensor weight, str activation)"
      " -> (Tensor grad_x, Tensor grad_y, Tensor grad_weight)");

  // x [T, Q, C, H, W], y [T, N, C, H, W] -> pooled [T, Q, N, C, H / pool, W / pool] and the place of
  // each in its window, uint8, see pair_pool/pair_pool.h; its gradient for maps of height and width
  // `size`; and the transpose of this
  m.def("pair_pool(Tensor x, Tensor y, int pool) -> (Tensor pooled, Tensor place)");
  m.def(
      "pair_pool_backward(Tensor grad_pooled, Tensor place, int[2] size, int pool)"
      " -> (Tensor grad_x, Tensor grad_y)");
  m.def("pair_pool_gather(Tensor x, Tensor y, Tensor place, int pool) -> Tensor");

  // x [T, Q, D], y [T, N, D], present [T, N] bool or all -> distances, indices [T, Q, k]
  m.def(
      "nearest(Tensor x, Tensor y, Tensor? present, int k, str metric)"
      " -> (Tensor distances, Tensor indices)");

  // query [T, Q, D], labels [T, Q], prototypes [T, N, D] -> loss of each query [T, Q], in float32
  // for bfloat16 and float16
  m.def(
      "prototype_loss(Tensor query, Tensor labels, Tensor prototypes, str metric, float scale)"
      " -> Tensor");
  // prototype_loss, and the gradient of sum(weight * loss) in the same pass; weight [T, Q], of the
  // loss's dtype
  m.def(
      "prototype_loss_backward(Tensor weight, Tensor query, Tensor labels, Tensor prototypes,"
      " str metric, float scale) -> (Tensor loss, Tensor grad_query, Tensor grad_prototypes)");

  // query [T, Q, D], query_labels [T, Q], support [T, S, D], support_labels [T, S] -> loss of each
  // query [T, Q], in float32 for bfloat16 and float16
  m.def(
      "matching_loss(Tensor query, Tensor query_labels, Tensor support, Tensor support_labels,"
      " str metric, float scale, bool exclude_self) -> Tensor");
  // matching_loss, and the gradient of sum(weight * loss) in the same pass; weight [T, Q], of the
  // loss's dtype
  m.def(
      "matching_loss_backward(Tensor weight, Tensor query, Tensor query_labels, Tensor support,"
      " Tensor support_labels, str metric, float scale, bool exclude_self)"
      " -> (Tensor loss, Tensor grad_query, Tensor grad_support)");

  // x [T, S, D], targets [T, S] int64 labels, or [T, S, N]; weight [T, N, D], bias [T, N]; lr [T,
  // K], float32 for bfloat16 and float16 -> the head after K steps of gradient descent, and what
  // its backward pass reads, see linear_head/linear_head.h. An absent output is an empty tensor
  // (last dimension 0). Absent are: bias and its gradient without a bias; the gradient of labels;
  // the gradient of x in first order, or if it is not requested.
  m.def(
      "linear_head(Tensor x, Tensor targets, Tensor weight, Tensor? bias, Tensor lr, str loss,"
      " float weight_decay, bool dual)"
      " -> (Tensor weight, Tensor bias, Tensor predictions, Tensor products)");
  m.def(
      "linear_head_backward(Tensor grad_weight, Tensor grad_bias, Tensor x, Tensor targets,"
      " Tensor weight, Tensor? bias, Tensor lr, Tensor predictions, Tensor products, str loss,"
      " float weight_decay, bool dual, bool first_order, bool input_grad)"
      " -> (Tensor grad_x, Tensor grad_targets, Tensor grad_weight, Tensor grad_bias,"
      " Tensor grad_lr)");

  // The head of linear_head, its mean loss on queries [T, Q, D] and their targets, the outputs
  // there, and all gradients of the mean of this loss over tasks; CPU only. Without input_grad x
  // and query get no gradient.
  m.def(
      "linear_head_loss(Tensor x, Tensor targets, Tensor weight, Tensor? bias, Tensor lr,"
      " Tensor query, Tensor query_targets, str loss, float weight_decay, bool dual,"
      " bool first_order, bool input_grad)"
      " -> (Tensor loss, Tensor outputs, Tensor grad_x, Tensor grad_targets, Tensor grad_weight,"
      " Tensor grad_bias, Tensor grad_lr, Tensor grad_query, Tensor grad_query_targets)");

  // x [T, S, D], y [T, S, N], weight [T, S], l2 [T] -> the ridge regression W [T, N, D], b [T, N] (or
  // [T, 0]), and what its backward pass reads, see ridge_head/ridge_head.h
  m.def(
      "ridge_head(Tensor x, Tensor y, Tensor weight, Tensor l2, bool bias, bool dual)"
      " -> (Tensor head, Tensor intercept, Tensor factor, Tensor coefficients)");
  m.def(
      "ridge_head_backward(Tensor grad_head, Tensor grad_intercept, Tensor x, Tensor y,"
      " Tensor weight, Tensor l2, Tensor head, Tensor factor, Tensor coefficients, bool bias,"
      " bool dual) -> (Tensor grad_x, Tensor grad_y, Tensor grad_weight, Tensor grad_l2)");

  // a [T, M, K] or transposed, b [T, K, N] or transposed, not both -> [T, M, N]; CPU only
  m.def("task_product(Tensor a, Tensor b, bool transpose_a, bool transpose_b) -> Tensor");

  // The three maps of convolution, see execution/conv_shape.h: x [T, B, C, H, W], weight [T, O, C /
  // groups, kh, kw], bias [T, O] -> [T, B, O, H', W']; its gradients with respect to x, of height
  // and width `size`, and to the weight. Images are returned channels-last in memory if they came
  // in so, which takes no copies, else contiguous.
  m.def(
      "task_conv2d(Tensor x, Tensor weight, Tensor? bias, int[2] stride, int[2] padding,"
      " int[2] dilation, int groups) -> Tensor");
  m.def(
      "task_conv2d_input(Tensor grad, Tensor weight, int[2] size, int[2] stride, int[2] padding,"
      " int[2] dilation, int groups) -> Tensor");
  m.def(
      "task_conv2d_weight(Tensor grad, Tensor x, int[2] kernel, int[2] stride, int[2] padding,"
      " int[2] dilation, int groups) -> Tensor");

  // x [T, B, C, P], weight, bias [T, C] -> y; its gradient, and the gradient of the gradient, see
  // batch_norm/batch_norm.h
  m.def("task_batch_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor");
  m.def(
      "task_batch_norm_backward(Tensor grad, Tensor x, Tensor weight, float eps)"
      " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)");
  m.def(
      "task_batch_norm_backward_backward(Tensor grad_grad_x, Tensor grad_grad_weight,"
      " Tensor grad_grad_bias, Tensor grad, Tensor x, Tensor weight, float eps)"
      " -> (Tensor grad_grad, Tensor grad_x, Tensor grad_weight)");

  // Elementwise: y, the gradient, and the gradient of the gradient, see activation/activation.h; the
  // kinds and their numbers a, b: execution/activation.h
  m.def("activation(Tensor x, int kind, float a, float b) -> Tensor");
  m.def("activation_backward(Tensor grad, Tensor x, int kind, float a, float b) -> Tensor");
  m.def(
      "activation_backward_backward(Tensor grad_grad_x, Tensor grad, Tensor x, int kind, float a,"
      " float b) -> (Tensor grad_grad, Tensor grad_x)");

  // A network and its loss as a list of instructions: code, see task_program/program/program.h.
  // theta [P] or [T, P], of which the first A are adapted, and the tasks share the others; frozen
  // [F]; lr [K or 1, T or 1, A or 1]; x [T, B, ...]; y [T, B] int64 labels, or [T, B, ...]; n
  // elements in an example's output. weight [T, B]: a task's loss is the sum of its examples' losses
  // times it; none: as the code says. A label -1 marks an absent example. A program with a batch norm
  // takes neither. A gradient has the shape of its input, and is empty if not requested.
  // -> outputs [T, B, n]
  m.def("task_program_forward(Tensor code, Tensor theta, Tensor frozen, Tensor x) -> Tensor");
  // -> loss [T], outputs [T, B, n], grad_theta [T, P], grad_x
  m.def(
      "task_program_gradient(Tensor code, Tensor theta, Tensor frozen, Tensor x, Tensor y,"
      " bool input_grad, Tensor? weight=None)"
      " -> (Tensor loss, Tensor outputs, Tensor grad_theta, Tensor grad_x)");
  // Raises ValueError for a label that the ops refuse; ignores targets of another loss. The ops
  // check labels themselves, but cannot while a CUDA graph is captured: whoever replays a graph
  // calls this.
  m.def("task_program_check_labels(Tensor code, Tensor support_y, Tensor query_y) -> ()");
  // vector [T, A] -> H vector [T, P], and the derivative of <gradient, vector> with respect to x
  m.def(
      "task_program_hvp(Tensor code, Tensor theta, Tensor frozen, Tensor x, Tensor y,"
      " Tensor vector, bool input_grad, Tensor? weight=None) -> (Tensor product, Tensor grad_x)");
  // vectors [T, N, A] -> H vector of each, or of the Gauss-Newton matrix J' H_L J [T, N, P]
  m.def(
      "task_program_products(Tensor code, Tensor theta, Tensor frozen, Tensor x, Tensor y,"
      " Tensor vectors, bool gauss_newton, Tensor? weight=None) -> Tensor");
  // -> theta after `steps` steps of gradient descent [T, A]; shared: P - A
  m.def(
      "task_program_adapt(Tensor code, Tensor theta, Tensor frozen, Tensor lr, Tensor x, Tensor y,"
      " int steps, int shared=0, Tensor? weight=None) -> Tensor");
  // grad_out [T, A]
  m.def(
      "task_program_adapt_backward(Tensor code, Tensor theta, Tensor frozen, Tensor lr, Tensor x,"
      " Tensor y, int steps, Tensor grad_out, bool first_order, bool keep, bool lr_grad,"
      " bool input_grad, Tensor? weight=None)"
      " -> (Tensor grad_theta, Tensor grad_lr, Tensor grad_x)");
  // -> the mean over tasks of the query loss after the steps (with weights, the weighted sum over
  // all steps), outputs [T, Q, n] after the last, and gradients of this mean
  m.def(
      "task_program_meta_gradient(Tensor code, Tensor theta, Tensor frozen, Tensor lr,"
      " Tensor support_x, Tensor support_y, Tensor query_x, Tensor query_y, float[] step_weights,"
      " int steps, bool first_order, bool keep, bool gradient, bool lr_grad, bool support_grad,"
      " bool query_grad, Tensor? support_weight=None, Tensor? query_weight=None)"
      " -> (Tensor loss, Tensor outputs, Tensor grad_theta, Tensor grad_lr, Tensor grad_support_x,"
      " Tensor grad_query_x)");
  // task_program_meta_gradient on a module's own parameters, for autograd: once differentiable in
  // parameters, lr, support_x and query_x
  m.def(
      "task_program_meta_loss(Tensor code, Tensor[] parameters, Tensor frozen, Tensor lr,"
      " Tensor support_x, Tensor support_y, Tensor query_x, Tensor query_y, float[] step_weights,"
      " int steps, bool first_order, bool keep, Tensor? support_weight=None,"
      " Tensor? query_weight=None) -> (Tensor loss, Tensor outputs)");
  // task_program_meta_loss with its gradients with respect to the parameters [P] and to lr, without
  // autograd
  m.def(
      "task_program_loss_and_gradient(Tensor code, Tensor[] parameters, Tensor frozen, Tensor lr,"
      " Tensor support_x, Tensor support_y, Tensor query_x, Tensor query_y, float[] step_weights,"
      " int steps, bool first_order, bool keep, bool lr_grad, Tensor? support_weight=None,"
      " Tensor? query_weight=None)"
      " -> (Tensor loss, Tensor outputs, Tensor grad_parameters, Tensor grad_lr)");

  // An encoder, a program whose tasks share theta [P]; x [T, B, ...], see task_program/encoder/encoder.h; CPU
  // only. What is not wanted is empty.
  // -> outputs [T, B, n], kept [T, K], statistics [T, S]
  m.def(
      "encode(Tensor code, Tensor theta, Tensor frozen, Tensor x, bool keeps, bool input_grad)"
      " -> (Tensor outputs, Tensor kept, Tensor statistics)");
  // grad [T, B, n]
  m.def(
      "encode_backward(Tensor code, Tensor theta, Tensor frozen, Tensor x, Tensor kept,"
      " Tensor grad, bool theta_grad, bool input_grad) -> (Tensor grad_theta, Tensor grad_x)");
  m.def(
      "encode_backward_backward(Tensor code, Tensor theta, Tensor frozen, Tensor x, Tensor kept,"
      " Tensor grad, Tensor? theta_dot, Tensor? x_dot, bool input_grad)"
      " -> (Tensor grad_grad, Tensor grad_theta, Tensor grad_x)");
}
