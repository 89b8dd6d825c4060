// A network and its loss as a list of instructions over learned parameters, theta [P], and constant
// ones, frozen [F]. Of theta the first A are adapted: each task has its own after a step. The tasks
// share the others.
//
// Python hands it over as a code tensor, int64 words:
//   header, 16 words    format 3; values V; instructions N; P; F; output value; loss kind (-1:
//                       none), its a and b; 1: mean, 0: sum; scale; first step; P - A; the rest 0
//   values, V words     elements of one example; value 0 is the input
//   instructions, N x 24 words
//                       opcode, x, x2, y, weight, bias, arguments [18]
// x, x2 and y are values, -1 none, each made by one instruction; a parameter is an offset in theta,
// -1 none, or -2 - its offset in frozen. Numbers that are no integers are the bits of a double.
// Arguments: linear I, O; activation kind, a, b; layer norm D, eps; convolution C, O, H, W, kernel h,
// w, stride h, w, padding h, w, dilation h, w, groups; norm C, groups (0: batch norm), eps, given
// mean, given variance (both in frozen, or none), rows; pool kind, C, H, W, kernel h, w, stride h, w,
// padding h, w, 1: an average counts the padding; transpose rows, columns. Images are channels-last
// in convolution, norm and pool: [H, W, C]. Weight and bias of a norm are [rows, C]: the pass at
// theta_k, k counted from the first step, reads row k, or the last if there are fewer.
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "execution/activation.h"
#include "execution/conv_shape.h"

namespace fastmeta {

inline constexpr int kHeaderWords = 16, kInstructionWords = 24;
inline constexpr int64_t kCodeFormat = 3;

enum class Opcode : int64_t {
  kLinear,
  kActivation,
  kAdd,
  kLayerNorm,
  kConvolution,
  kNorm,  // of channels, over the batch or within an example
  kPool,
  kTranspose,  // of each example
};

enum class LossKind : int64_t {
  kNone = -1,
  kCrossEntropy,  // a: label smoothing, b: index to ignore, an integer
  kMse,
  kBceWithLogits,
  kHuber,  // a: delta
  kL1,
};

enum class PoolKind : int64_t { kMax, kAverage };

inline constexpr int64_t kNoParameter = -1;

// Windows over images [H, W, C].
struct PoolShape {
  PoolKind kind;
  int64_t channels, height, width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w;
  bool counts_padding;

  FASTMETA_HOST_DEVICE int64_t out_height() const {
    return (height + 2 * padding_h - kernel_h) / stride_h + 1;
  }
  FASTMETA_HOST_DEVICE int64_t out_width() const {
    return (width + 2 * padding_w - kernel_w) / stride_w + 1;
  }
  FASTMETA_HOST_DEVICE int64_t in_positions() const { return height * width; }
  FASTMETA_HOST_DEVICE int64_t out_positions() const { return out_height() * out_width(); }
};

struct Value {
  int64_t elements;  // of one example
  int64_t extra;     // statistics that its layer keeps beside them
  int64_t offset;    // in an example's numbers, of its elements and then extra; none for the input
  int64_t delta;     // offset of its gradient
  bool adapts;       // depends on an adapted parameter: has a tangent
  bool learns;       // depends on theta: its gradient is wanted
};

struct Instruction {
  Opcode op;
  int x, x2, y;
  int64_t weight, bias;
  int64_t inputs, outputs;  // linear: I, O; layer norm: D in both; convolution and norm: C, O
  ConvShape conv;
  PoolShape pool;          // of a pool, or of the one fused behind a norm
  int64_t groups;          // of a norm; 0: batch norm
  int64_t mean, variance;  // of a norm on given statistics
  int64_t parameter_rows;  // of a norm
  int64_t shift;           // of a batch norm: bias of the layer before, which it takes away again
  bool relu, max_pool;     // of a norm: fused behind it
  int normed;              // output of the batch norm whose moments a convolution makes, or -1
  bool is_fused;           // convolution fused with its norm: its outputs have no memory
  bool has_moments;        // of a norm: the convolution before makes them
  int64_t rows;            // of a transpose, whose columns are its outputs
  ActivationKind activation;
  double a, b;  // of the activation; layer norm: a = eps
  // Whether, going backwards, an earlier instruction has written this gradient already.
  bool adds_to_x, adds_to_x2, adds_to_weight, adds_to_bias;
  // Whether the next (in the order of the pass) activation is fused into this linear layer.
  bool with_next, with_previous;
};

struct LossSpec {
  LossKind kind;
  double a, b;
  bool mean;
  double scale;
};

// Elements of theta.
struct Part {
  int64_t begin, count;
};

// A program without ownership, readable by the host and by a kernel.
struct Program {
  const Instruction* instructions;
  const Value* values;
  int instruction_count, value_count, output;
  int64_t parameters, adapted, frozen;  // P, A, F
  int64_t first_step;                   // theta on entry is theta after so many steps
  int64_t example_elements;             // numbers of all values of an example, without the input
  int64_t delta_elements;               // numbers of their gradients
  const Part* unwritten;                // what the backward pass may leave out of the gradient,
  int unwritten_count;                  // in order
  bool writes_once;                     // it writes no element twice
  bool has_rows;        // some parameters have a row for each step: unwritten, or written
  bool has_images;      // convolutions, norms, pools: not for executors of small networks
  bool has_batch_norm;  // some statistics are of a batch: no example may be absent
  LossSpec loss;

  FASTMETA_HOST_DEVICE int64_t output_elements() const { return values[output].elements; }
  FASTMETA_HOST_DEVICE bool adapts(int64_t parameter) const {
    return parameter >= 0 && parameter < adapted;
  }
};

FASTMETA_HOST_DEVICE constexpr bool is_learned(int64_t parameter) { return parameter >= 0; }

// Whether a norm computes its statistics from the batch that it normalises.
FASTMETA_HOST_DEVICE constexpr bool is_batch_norm(const Instruction& i) {
  return i.op == Opcode::kNorm && i.groups == 0 && i.mean == kNoParameter;
}

// Parameter that lies `elements` behind another one.
FASTMETA_HOST_DEVICE constexpr int64_t parameter_behind(int64_t parameter, int64_t elements) {
  if (parameter == kNoParameter) return kNoParameter;
  return is_learned(parameter) ? parameter + elements : parameter - elements;
}

}  // namespace fastmeta
