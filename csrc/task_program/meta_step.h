// Inner loop of a task and its adjoint recursion (MATH: Maclaurin 2015, Franceschi 2017; MAML: Finn
// 2017), on any executor:
//
//   theta_{k+1} = theta_k - lr_k g_k,  g_k = grad L_s(theta_k)         k = 0 .. K-1
//   v_K  = w_K grad L_q(theta_K)
//   v_k  = v_{k+1} - H_k (lr_k v_{k+1}) + w_k grad L_q(theta_k)        first order: without H_k
//   d lr_k += -g_k v_{k+1}           d x_s += -d<grad L_s(theta_k), lr_k v_{k+1}>/d x_s
//
// The Hessian-vector product has the direction v_{k+1}; -lr_k times each layer's part is added to v
// as soon as no other layer reads that part of v. If step sizes differ between parameters, or
// layers share one, the direction -lr_k v_{k+1} is an array of its own.
//
// Parameters that are learned and not adapted have no part in theta_k, g_k and the direction. Their
// part of v is the gradient of the meta-loss to them, which the products' mixed terms add to.
#pragma once

#include "task_program/passes.h"

namespace fastmeta {

struct MetaOptions {
  int steps;
  bool first_order;
  bool lr_grad;
  bool keeps_steps;  // values and gradients of all K steps, else of one step, recomputed
};

// Step sizes: lr[k, p] at a task's lr + k step_stride + (per_parameter ? p : 0).
template <typename storage_t>
struct StepSizes {
  Array<storage_t> lr;
  int64_t step_stride;
  bool per_parameter;

  FASTMETA_HOST_DEVICE Array<storage_t> of(int k) const { return lr.from(k * step_stride); }
};

// Computes target = base - lr x, or -lr x without a base.
template <typename storage_t>
struct Descend {
  Array<storage_t> lr;
  bool per_parameter;
  Array<storage_t> base, x, target;

  template <typename Accessor>
  FASTMETA_HOST_DEVICE void operator()(const Accessor& at) const {
    using number_t = typename Accessor::number_t;
    const number_t step = per_parameter ? at.load(lr) : at.load_one(lr, 0);
    const number_t start = base ? at.load(base) : number_t(0);
    at.store(target, start - step * at.load(x));
  }
};

// Applies Descend to each part of the gradient while it is computed.
template <typename storage_t>
struct DescendFrom {
  Descend<storage_t> all;

  FASTMETA_HOST_DEVICE Descend<storage_t> from(int64_t parameter) const {
    Descend<storage_t> part = all;
    if (all.per_parameter) part.lr = all.lr.from(parameter);
    part.base = all.base.from(parameter);
    part.x = all.x.from(parameter);
    part.target = all.target.from(parameter);
    return part;
  }
};

// Computes target -= a b.
template <typename storage_t>
struct SubtractProduct {
  Array<storage_t> a, b, target;

  template <typename Accessor>
  FASTMETA_HOST_DEVICE void operator()(const Accessor& at) const {
    at.store(target, at.load(target) - at.load(a) * at.load(b));
  }
};

// Arrays that a task's steps read and write; empty if not wanted.
template <typename storage_t>
struct TaskArrays {
  Array<storage_t> start, frozen;  // theta_0 [P] and [F]
  Array<storage_t> states;         // theta_1 .. theta_K [A], the adapted parameters
  Array<storage_t> grads;          // g_0 .. g_{K-1} [A]
  Array<storage_t> v;              // [P]
  Array<storage_t> direction;      // [A], if it is not v
  Array<storage_t> loss;           // [1]
  Array<storage_t> outputs;        // after the last step, as later passes overwrite the values
  Array<storage_t> grad_lr;        // as the step sizes of a task
  Array<storage_t> grad_support, grad_query;  // as x
  StepSizes<storage_t> step_sizes;
  Examples<storage_t> support, query;
  Activations<storage_t> support_arrays, query_arrays;  // of step 0; of the queries
  // Distance from a step to the next; 0: one for all.
  int64_t state_stride = 0, grads_stride = 0, step_stride = 0, grad_lr_stride = 0;
};

template <typename Executor>
class MetaStep {
 public:
  using storage_t = typename Executor::storage_t;
  using Arena = Array<storage_t>;

  FASTMETA_HOST_DEVICE MetaStep(Executor& exec, const Program& program, const MetaOptions& options,
                                const TaskArrays<storage_t>& task)
      : exec_(exec), program_(program), options_(options), task_(task) {}

  FASTMETA_HOST_DEVICE Arena theta(int k) const {
    return k == 0 ? task_.start : task_.states.from((k - 1) * task_.state_stride);
  }

  FASTMETA_HOST_DEVICE void adapt() const {
    for (int k = 0; k < options_.steps; ++k) {
      const Descend<storage_t> descend{task_.step_sizes.of(k), task_.step_sizes.per_parameter,
                                       theta(k), grads(k), theta(k + 1)};
      if (program_.writes_once && !program_.has_rows) {
        support_gradient(k, grads(k), DescendFrom<storage_t>{descend});
        // After the pass: g_k may be in the memory of theta_{k+1}.
        copy_unwritten(exec_, program_, program_.adapted, theta(k), theta(k + 1));
      } else {
        support_gradient(k, grads(k), NoUpdate{});
        exec_.map(program_.adapted, descend);
      }
    }
  }

  // Computes loss += weight L_q(theta_k); v = (or +=) weight grad L_q(theta_k), if wanted.
  FASTMETA_HOST_DEVICE void query(int k, double weight, bool gradient, bool adds) const {
    const auto net = query_network(k);
    const Passes<Executor> passes(exec_, net);
    passes.forward();
    passes.loss(task_.loss, weight, gradient);
    if (k == options_.steps && task_.outputs) {
      const int out = program_.output;
      exec_.map(net.size(out), Copy<storage_t>{net.value(out), task_.outputs});
    }
    if (!gradient) return;
    passes.backward(learned(task_.v), adds);
    if (task_.grad_query) {
      exec_.map(net.size(0), Copy<storage_t>{net.delta(0), task_.grad_query, adds});
    }
  }

  FASTMETA_HOST_DEVICE void query_outputs() const {
    const auto net = query_network(options_.steps);
    Passes<Executor>(exec_, net).forward();
  }

  // Computes v = H direction, or J' H_L J direction, of `vectors` directions; at theta_0. What does
  // not depend on the direction is computed once. Also the inputs' derivative, of the last.
  FASTMETA_HOST_DEVICE void curvature_products(int64_t vectors, bool gauss_newton) const {
    if (gauss_newton) {
      Passes<Executor>(exec_, support_network(0)).forward();
    } else {
      support_gradient(0, Arena{}, NoUpdate{});
    }
    for (int64_t n = 0; n < vectors; ++n) {
      const Arena direction = task_.direction.from(n * program_.adapted);
      const Arena product = task_.v.from(n * program_.parameters);
      if (gauss_newton) {
        gauss_newton_product(direction, product);
      } else {
        hessian_product(0, direction, product, {});
      }
    }
    if (!task_.grad_support) return;
    const auto net = support_network(0, task_.direction);
    exec_.map(net.size(0), Copy<storage_t>{net.delta_dot(0), task_.grad_support});
  }

  // Computes v_k from v_{k+1}, without the queries' own part.
  FASTMETA_HOST_DEVICE void step_back(int k) const {
    const bool is_there = options_.first_order || options_.keeps_steps || k + 1 == options_.steps;
    if (!is_there) support_gradient(k, options_.lr_grad ? grads(k) : Arena{}, NoUpdate{});
    if (options_.lr_grad) step_size_gradient(k);
    if (options_.first_order) return;
    const Arena step_size = task_.step_sizes.of(k);
    if (task_.direction) {
      exec_.map(program_.adapted, Descend<storage_t>{step_size, task_.step_sizes.per_parameter,
                                                     Arena{}, task_.v, task_.direction});
      hessian_product(k, task_.direction, task_.v, {true});
    } else {
      hessian_product(k, task_.v, task_.v, {true, step_size});
    }
    if (task_.grad_support) support_input_gradient(k);
  }

 private:
  FASTMETA_HOST_DEVICE Arena grads(int k) const { return task_.grads.from(k * task_.grads_stride); }
  // All learned parameters of a gradient; the inner steps take the adapted ones only.
  FASTMETA_HOST_DEVICE ParameterGradient<storage_t> learned(Arena gradient) const {
    return {gradient, program_.parameters};
  }

  FASTMETA_HOST_DEVICE Network<storage_t> support_network(int k, Arena direction = {}) const {
    Network<storage_t> net{program_,      parameters(k),        direction,
                           task_.support, task_.support_arrays, program_.first_step + k};
    const int64_t offset = k * task_.step_stride;
    net.arrays.value = net.arrays.value.from(offset);
    net.arrays.delta = net.arrays.delta.from(offset);
    return net;
  }

  FASTMETA_HOST_DEVICE Network<storage_t> query_network(int k) const {
    return {program_, parameters(k), {}, task_.query, task_.query_arrays, program_.first_step + k};
  }

  FASTMETA_HOST_DEVICE Parameters<storage_t> parameters(int k) const {
    return {theta(k), task_.start, task_.frozen};
  }

  // Computes values of step k and their gradients, and g_k if wanted.
  template <typename Update>
  FASTMETA_HOST_DEVICE void support_gradient(int k, Arena gradient, const Update& update) const {
    const auto net = support_network(k);
    const Passes<Executor> passes(exec_, net);
    passes.forward();
    passes.loss({}, 1, true);
    passes.backward({gradient, program_.adapted}, false, update);
  }

  // Computes target = (or as `into` says) H_k direction, and the tangent of the inputs' gradient.
  FASTMETA_HOST_DEVICE void hessian_product(int k, Arena direction, Arena target,
                                            const StoreMode<storage_t>& into) const {
    const auto net = support_network(k, direction);
    const Passes<Executor> passes(exec_, net);
    passes.tangent_forward();
    passes.tangent_backward(learned(target), into);
  }

  FASTMETA_HOST_DEVICE void gauss_newton_product(Arena direction, Arena target) const {
    const auto net = support_network(0, direction);
    const Passes<Executor> passes(exec_, net);
    passes.tangent_forward();
    passes.gauss_newton_backward(learned(target));
  }

  // Computes grad_support (+)= the derivative of <g_k, -lr_k v_{k+1}>.
  FASTMETA_HOST_DEVICE void support_input_gradient(int k) const {
    const auto net = support_network(k);
    const bool adds = k + 1 < options_.steps;
    if (task_.direction) {
      exec_.map(net.size(0), Copy<storage_t>{net.delta_dot(0), task_.grad_support, adds});
    } else {
      exec_.map(net.size(0), Descend<storage_t>{task_.step_sizes.of(k), false,
                                                adds ? task_.grad_support : Arena{},
                                                net.delta_dot(0), task_.grad_support});
    }
  }

  FASTMETA_HOST_DEVICE void step_size_gradient(int k) const {
    const Arena target = task_.grad_lr.from(k * task_.grad_lr_stride);
    if (task_.step_sizes.per_parameter) {
      exec_.map(program_.adapted, SubtractProduct<storage_t>{grads(k), task_.v, target});
    } else {
      exec_.reduce(program_.adapted, NegativeProduct<storage_t>{grads(k), task_.v}, target);
    }
  }

  Executor& exec_;
  const Program& program_;
  const MetaOptions& options_;
  const TaskArrays<storage_t>& task_;
};

}  // namespace fastmeta
