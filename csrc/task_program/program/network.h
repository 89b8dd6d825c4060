// One pass of a batch of examples through a program: the arrays of its values, and the views that
// layers read. The passes themselves are in task_program/passes.h.
#pragma once

#include "execution/executor.h"
#include "task_program/program/program.h"

namespace fastmeta {

// Examples of a task. `targets` are labels as numbers, negative if they do not count, or a
// regression's targets; `norm`, one number, multiplies the loss of an example, and so does its own
// number in `weight`, which may be empty.
template <typename storage_t>
struct Examples {
  int64_t count;
  Array<storage_t> x, targets, norm, weight;
};

// theta_k: the adapted parameters [A] after k steps, and the start [P], which has the shared ones.
template <typename storage_t>
struct Parameters {
  Array<storage_t> adapted, start, frozen;
};

// Gradient of the first `count` parameters of theta: of all, or of the adapted ones.
template <typename storage_t>
struct ParameterGradient {
  Array<storage_t> arena;
  int64_t count;

  FASTMETA_HOST_DEVICE explicit operator bool() const { return static_cast<bool>(arena); }
  // The part of a parameter; empty if it is not wanted.
  FASTMETA_HOST_DEVICE Array<storage_t> at(int64_t parameter) const {
    const bool is_wanted = arena && is_learned(parameter) && parameter < count;
    return is_wanted ? arena.from(parameter) : Array<storage_t>{};
  }
};

// Arrays of the values, each [B, elements], one after the other: an arena for the values, one for
// their gradients, and one for the tangents of each. The input is not in them.
template <typename storage_t>
struct Activations {
  Array<storage_t> value, delta, value_dot, delta_dot;
  Array<storage_t> input_delta, input_delta_dot;  // empty if not wanted
  Array<storage_t> row_loss;                      // [B]
};

template <typename storage_t>
struct Network {
  const Program& program;
  Parameters<storage_t> parameters;
  Array<storage_t> direction;  // theta_dot [A]
  Examples<storage_t> examples;
  Activations<storage_t> arrays;
  int64_t step = 0;  // k, of theta_k

  FASTMETA_HOST_DEVICE const Value& info(int v) const { return program.values[v]; }
  FASTMETA_HOST_DEVICE int64_t size(int v) const { return examples.count * info(v).elements; }

  FASTMETA_HOST_DEVICE Array<storage_t> value(int v) const {
    return v == 0 ? examples.x : inside(arrays.value, v);
  }
  // Gradient of a value; empty if nobody needs it.
  FASTMETA_HOST_DEVICE Array<storage_t> delta(int v) const {
    if (v == 0) return arrays.input_delta;
    if (!reaches_what_is_wanted(v)) return {};
    return arrays.delta.from(examples.count * info(v).delta);
  }
  // Tangent of a value; empty if it is zero.
  FASTMETA_HOST_DEVICE Array<storage_t> value_dot(int v) const {
    return info(v).adapts ? inside(arrays.value_dot, v) : Array<storage_t>{};
  }
  FASTMETA_HOST_DEVICE Array<storage_t> delta_dot(int v) const {
    if (v == 0) return arrays.input_delta_dot;
    return reaches_what_is_wanted(v) ? inside(arrays.delta_dot, v) : Array<storage_t>{};
  }
  // Numbers that a layer keeps beside its output y, and their tangents.
  FASTMETA_HOST_DEVICE Array<storage_t> extra(int y) const { return value(y).from(size(y)); }
  FASTMETA_HOST_DEVICE Array<storage_t> extra_dot(int y) const {
    const auto tangent = value_dot(y);
    return tangent ? tangent.from(size(y)) : tangent;
  }
  FASTMETA_HOST_DEVICE Array<storage_t> parameter(int64_t reference) const {
    if (reference == kNoParameter) return {};
    if (!is_learned(reference)) return parameters.frozen.from(-2 - reference);
    const bool adapts = program.adapts(reference);
    return (adapts ? parameters.adapted : parameters.start).from(reference);
  }
  // Tangent of a parameter; empty if it is not adapted.
  FASTMETA_HOST_DEVICE Array<storage_t> tangent_of(int64_t reference) const {
    return program.adapts(reference) ? direction.from(reference) : Array<storage_t>{};
  }

 private:
  FASTMETA_HOST_DEVICE bool reaches_what_is_wanted(int v) const {
    return info(v).learns || arrays.input_delta || arrays.input_delta_dot;
  }
  FASTMETA_HOST_DEVICE Array<storage_t> inside(const Array<storage_t>& arena, int v) const {
    return arena.from(examples.count * info(v).offset);
  }
};

}  // namespace fastmeta
