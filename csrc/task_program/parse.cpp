#include "task_program/parse.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <bit>
#include <limits>
#include <map>
#include <set>

#include "common/ceil_div.h"

namespace fastmeta {
namespace {

double number(int64_t word) { return std::bit_cast<double>(word); }

bool is_halving(const Instruction& i) {
  const PoolShape& p = i.pool;
  return i.op == Opcode::kPool && p.kind == PoolKind::kMax && p.kernel_h == 2 && p.kernel_w == 2 &&
         p.stride_h == 2 && p.stride_w == 2 && p.padding_h == 0 && p.padding_w == 0;
}

bool keeps_sign(const Instruction& i) {
  return i.op == Opcode::kActivation && (i.activation == ActivationKind::kRelu ||
                                         (i.activation == ActivationKind::kLeakyRelu && i.a >= 0));
}

int64_t weight_size(const Instruction& i) {
  if (i.op == Opcode::kConvolution) return i.conv.weight_size();
  return i.op == Opcode::kLinear ? i.inputs * i.outputs : i.inputs;
}

bool is_of_images(const Instruction& i) { return i.op >= Opcode::kConvolution; }

// Whether statistics are both given or both absent, not adapted, and of the whole batch.
bool has_fitting_statistics(const Instruction& i) {
  if (i.mean == kNoParameter && i.variance == kNoParameter) return true;
  return i.groups == 0 && i.mean < kNoParameter && i.variance < kNoParameter;
}

bool has_parameters(const Instruction& i) {
  return i.op == Opcode::kLinear || i.op == Opcode::kLayerNorm || i.op == Opcode::kConvolution ||
         i.op == Opcode::kNorm;
}

constexpr int64_t kMost = 1 << 20;
constexpr int64_t kValueAlign = 4;  // numbers that a kernel reads at once

// Whether sizes, strides and dilations are at least 1 and paddings at least 0, none so large that
// products overflow.
bool are_sizes(std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> paddings) {
  const auto between = [](const std::initializer_list<int64_t>& all, int64_t least) {
    return std::all_of(all.begin(), all.end(), [=](int64_t n) { return n >= least && n < kMost; });
  };
  return between(sizes, 1) && between(paddings, 0);
}

bool fits_convolution(const ConvShape& c, int64_t x, int64_t y) {
  return are_sizes({c.channels, c.outputs, c.height, c.width, c.kernel_h, c.kernel_w, c.stride_h,
                    c.stride_w, c.dilation_h, c.dilation_w},
                   {c.padding_h, c.padding_w}) &&
         (c.groups == 1 || (c.groups == c.channels && c.outputs % c.groups == 0)) &&
         c.height + 2 * c.padding_h > c.dilation_h * (c.kernel_h - 1) &&
         c.width + 2 * c.padding_w > c.dilation_w * (c.kernel_w - 1) &&
         x == c.in_positions() * c.channels && y == c.out_positions() * c.outputs;
}

bool fits_pool(const PoolShape& p, int64_t x, int64_t y) {
  return (p.kind == PoolKind::kMax || p.kind == PoolKind::kAverage) &&
         are_sizes({p.channels, p.height, p.width, p.kernel_h, p.kernel_w, p.stride_h, p.stride_w},
                   {p.padding_h, p.padding_w}) &&
         2 * p.padding_h <= p.kernel_h && 2 * p.padding_w <= p.kernel_w &&
         p.height + 2 * p.padding_h >= p.kernel_h && p.width + 2 * p.padding_w >= p.kernel_w &&
         x == p.in_positions() * p.channels && y == p.out_positions() * p.channels;
}

// Instructions from the first to the last that use a gradient, its size, and where it lies.
struct Lifetime {
  int first = std::numeric_limits<int>::max(), last = 0;
  int64_t size = 0, place = 0;

  void include(int instruction) {
    first = std::min(first, instruction);
    last = std::max(last, instruction);
  }
  bool meets(const Lifetime& other) const { return first <= other.last && other.first <= last; }
};

// Places gradients so that none meet in time and in memory, the largest first, each as low as it
// goes. Returns how much memory they take.
int64_t place(std::map<int64_t, Lifetime>& groups) {
  std::vector<Lifetime*> waiting, placed;  // by place
  for (auto& [_, group] : groups) waiting.push_back(&group);
  std::stable_sort(waiting.begin(), waiting.end(),
                   [](const auto* a, const auto* b) { return a->size > b->size; });
  int64_t most = 0;
  for (auto* group : waiting) {
    for (const auto* other : placed) {
      const bool is_above = other->place >= group->place + group->size;
      if (group->meets(*other) && !is_above) {
        group->place = std::max(group->place, other->place + other->size);
      }
    }
    const auto above = std::find_if(placed.begin(), placed.end(),
                                    [&](const auto* other) { return other->place > group->place; });
    placed.insert(above, group);
    most = std::max(most, group->place + group->size);
  }
  return most;
}

}  // namespace

ParsedProgram::ParsedProgram(const at::Tensor& code) {
  TORCH_CHECK(code.scalar_type() == at::kLong && code.dim() == 1 && code.device().is_cpu() &&
                  code.is_contiguous(),
              "code: expected a contiguous int64 vector on the CPU, got ", code.scalar_type(), " ",
              code.sizes(), " on ", code.device());
  const int64_t* words = code.const_data_ptr<int64_t>();
  TORCH_CHECK(code.numel() >= kHeaderWords && words[0] == kCodeFormat, "code: expected format ",
              kCodeFormat);
  const int64_t values = words[1], instructions = words[2];
  TORCH_CHECK(values >= 1 && values < kMost && instructions >= 0 && instructions < kMost &&
                  code.numel() == kHeaderWords + values + instructions * kInstructionWords,
              "code: expected the length in its header, got ", code.numel(), " words");
  program_.parameters = words[3];
  program_.adapted = words[3] - words[12];
  TORCH_CHECK(words[12] >= 0 && words[12] <= words[3],
              "code: expected shared parameters from 0 to ", words[3], ", got ", words[12]);
  program_.frozen = words[4];
  program_.output = static_cast<int>(words[5]);
  program_.loss = {static_cast<LossKind>(words[6]), number(words[7]), 0, words[9] != 0,
                   number(words[10])};
  program_.first_step = words[11];
  TORCH_CHECK(words[11] >= 0 && words[11] < kMost, "unknown first step ", words[11]);
  TORCH_CHECK(words[6] >= -1 && words[6] <= static_cast<int64_t>(LossKind::kL1), "unknown loss ",
              words[6]);
  program_.loss.b = program_.loss.kind == LossKind::kCrossEntropy ? static_cast<double>(words[8])
                                                                  : number(words[8]);
  const int64_t* word = words + kHeaderWords;
  for (int64_t v = 0; v < values; ++v, ++word) {
    TORCH_CHECK(*word >= 1, "code: expected values with elements, got ", *word);
    values_.push_back({*word, 0, 0, 0, false, false});
  }
  made_.assign(values, false);
  made_[0] = true;
  for (int64_t k = 0; k < instructions; ++k, word += kInstructionWords) read_instruction(word);
  TORCH_CHECK(words[5] >= 0 && words[5] < values && made_[words[5]],
              "no instruction makes the output");
  drop_unused();
  count_readers();
  drop_shifts();
  fuse_norms();
  lay_out_values();
  plan_gradients();
  find_unwritten();
  pair_activations();
  pair_norms();
  program_.has_images = std::any_of(instructions_.begin(), instructions_.end(), is_of_images);
  program_.has_batch_norm = std::any_of(instructions_.begin(), instructions_.end(), is_batch_norm);
  program_.instructions = instructions_.data();
  program_.instruction_count = static_cast<int>(instructions_.size());
  program_.values = values_.data();
  program_.value_count = static_cast<int>(values_.size());
}

void ParsedProgram::read_instruction(const int64_t* words) {
  const auto input = [&](int64_t v) {
    TORCH_CHECK(v >= 0 && v < static_cast<int64_t>(values_.size()) && made_[v],
                "an instruction reads value ", v, ", which nothing before it makes");
    return static_cast<int>(v);
  };
  TORCH_CHECK(words[0] >= 0 && words[0] <= static_cast<int64_t>(Opcode::kTranspose),
              "unknown instruction ", words[0]);
  Instruction i{};
  i.mean = i.variance = i.shift = kNoParameter;
  i.parameter_rows = 1;
  i.op = static_cast<Opcode>(words[0]);
  i.x = input(words[1]);
  i.x2 = i.op == Opcode::kAdd ? input(words[2]) : -1;
  TORCH_CHECK(words[3] > 0 && words[3] < static_cast<int64_t>(values_.size()) && !made_[words[3]],
              "value ", words[3], " cannot be made here");
  i.y = static_cast<int>(words[3]);
  i.weight = i.bias = kNoParameter;
  const int64_t* arguments = words + 6;
  const int64_t x = values_[i.x].elements, y = values_[i.y].elements;
  bool fits = x == y;
  switch (i.op) {
    case Opcode::kLinear:
      i.inputs = arguments[0];
      i.outputs = arguments[1];
      fits = i.inputs >= 1 && i.outputs >= 1 && x % i.inputs == 0 &&
             x / i.inputs * i.outputs == y && words[4] != kNoParameter;
      break;
    case Opcode::kActivation:
      TORCH_CHECK(is_activation(arguments[0]), "unknown activation ", arguments[0]);
      i.activation = static_cast<ActivationKind>(arguments[0]);
      i.a = number(arguments[1]);
      i.b = number(arguments[2]);
      break;
    case Opcode::kAdd:
      fits = fits && values_[i.x2].elements == y;
      break;
    case Opcode::kLayerNorm:
      i.inputs = i.outputs = arguments[0];
      fits = fits && i.inputs >= 1 && x % i.inputs == 0;
      i.a = number(arguments[1]);
      break;
    case Opcode::kConvolution:
      i.conv = {arguments[0],  arguments[1],  arguments[2], arguments[3], arguments[4],
                arguments[5],  arguments[6],  arguments[7], arguments[8], arguments[9],
                arguments[10], arguments[11], arguments[12]};
      i.inputs = i.conv.channels;
      i.outputs = i.conv.outputs;
      fits = fits_convolution(i.conv, x, y) && words[4] != kNoParameter;
      break;
    case Opcode::kNorm:
      i.inputs = i.outputs = arguments[0];
      i.groups = arguments[1];
      i.a = number(arguments[2]);
      i.mean = arguments[3];
      i.variance = arguments[4];
      i.parameter_rows = arguments[5];
      fits = fits && i.inputs >= 1 && x % i.inputs == 0 && i.groups >= 0 &&
             (i.groups == 0 || i.inputs % i.groups == 0) && has_fitting_statistics(i) &&
             i.parameter_rows >= 1 && i.parameter_rows < kMost && i.inputs < kMost;
      break;
    case Opcode::kPool:
      i.pool = {static_cast<PoolKind>(arguments[0]),
                arguments[1],
                arguments[2],
                arguments[3],
                arguments[4],
                arguments[5],
                arguments[6],
                arguments[7],
                arguments[8],
                arguments[9],
                arguments[10] != 0};
      fits = fits_pool(i.pool, x, y);
      break;
    case Opcode::kTranspose:
      i.rows = arguments[0];
      i.outputs = arguments[1];
      fits = fits && i.rows >= 1 && i.outputs >= 1 && x == i.rows * i.outputs;
      break;
  }
  TORCH_CHECK(fits, "instruction ", instructions_.size(), " does not fit values of ", x, " and ", y,
              " elements");
  if (i.op == Opcode::kLayerNorm) values_[i.y].extra = 2 * (y / i.inputs);
  if (i.op == Opcode::kNorm) values_[i.y].extra = 4 * i.inputs;
  if (i.op == Opcode::kPool && i.pool.kind == PoolKind::kMax) values_[i.y].extra = y;
  if (has_parameters(i)) {
    i.weight = words[4];
    i.bias = words[5];
    check_parameter(i.weight, weight_size(i) * i.parameter_rows);
    check_parameter(i.bias, i.outputs * i.parameter_rows);
    check_parameter(i.mean, i.inputs);
    check_parameter(i.variance, i.inputs);
  }
  values_[i.y].adapts = values_[i.x].adapts || (i.x2 >= 0 && values_[i.x2].adapts) ||
                        program_.adapts(i.weight) || program_.adapts(i.bias);
  values_[i.y].learns = values_[i.x].learns || (i.x2 >= 0 && values_[i.x2].learns) ||
                        is_learned(i.weight) || is_learned(i.bias);
  made_[i.y] = true;
  instructions_.push_back(i);
}

void ParsedProgram::check_parameter(int64_t parameter, int64_t size) const {
  if (parameter == kNoParameter) return;
  const int64_t begin = is_learned(parameter) ? parameter : -2 - parameter;
  int64_t all = is_learned(parameter) ? program_.parameters : program_.frozen;
  if (program_.adapts(parameter)) all = program_.adapted;
  TORCH_CHECK(begin <= all - size, "a parameter of ", size, " elements at ", begin,
              " does not lie within ", all);
}

// Drops instructions that the output does not depend on.
void ParsedProgram::drop_unused() {
  std::vector<bool> used(values_.size(), false);
  used[program_.output] = true;
  for (auto i = instructions_.rbegin(); i != instructions_.rend(); ++i) {
    if (!used[i->y]) continue;
    used[i->x] = true;
    if (i->x2 >= 0) used[i->x2] = true;
  }
  std::erase_if(instructions_, [&](const Instruction& i) { return !used[i.y]; });
}

// Counts the readers of each value; the caller reads the output, and the input is not ours.
void ParsedProgram::count_readers() {
  readers_.assign(values_.size(), 0);
  readers_[0] = readers_[program_.output] = 1;
  for (const auto& i : instructions_) {
    ++readers_[i.x];
    if (i.x2 >= 0) ++readers_[i.x2];
  }
}

// Drops biases before a batch norm. It removes any constant added to a channel: such a bias changes
// nothing and has the gradient 0.
void ParsedProgram::drop_shifts() {
  for (auto& norm : instructions_) {
    if (!is_batch_norm(norm) || readers_[norm.x] != 1) continue;
    for (auto& i : instructions_) {
      const bool is_bilinear = i.op == Opcode::kConvolution || i.op == Opcode::kLinear;
      if (i.y != norm.x || !is_bilinear || i.outputs != norm.inputs) continue;
      norm.shift = i.bias;
      i.bias = kNoParameter;
    }
  }
}

// Fuses a norm with the ReLU that is its only reader, and with the 2 x 2 max pool that is the
// ReLU's only reader.
void ParsedProgram::fuse_norms() {
  std::vector<Instruction> fused;
  for (const auto& i : instructions_) {
    auto* last = fused.empty() ? nullptr : &fused.back();
    const bool follows =
        last != nullptr && last->op == Opcode::kNorm && last->y == i.x && readers_[i.x] == 1;
    const bool is_relu = i.op == Opcode::kActivation && i.activation == ActivationKind::kRelu;
    if (follows && is_relu && !last->relu) {
      last->relu = true;
    } else if (follows && last->relu && !last->max_pool && is_halving(i)) {
      last->max_pool = true;
      last->pool = i.pool;
    } else {
      fused.push_back(i);
      continue;
    }
    values_[i.y].extra = values_[last->y].extra + (last->max_pool ? 2 * values_[i.y].elements : 0);
    last->y = i.y;
  }
  instructions_ = std::move(fused);
}

// Gives each value memory of its own, except outputs of ReLU and LeakyReLU: their sign is the
// input's sign, so they overwrite the input if nothing else reads it. Values begin at multiples of
// kValueAlign, and so do the arenas behind one another: kernels then read several numbers at once.
void ParsedProgram::lay_out_values() {
  program_.example_elements = 0;
  for (const auto& i : instructions_) {
    Value& y = values_[i.y];
    if (i.is_fused) continue;
    if (keeps_sign(i) && readers_[i.x] == 1) {
      y.offset = values_[i.x].offset;
    } else {
      y.offset = program_.example_elements;
      program_.example_elements += ceil_div(y.elements + y.extra, kValueAlign) * kValueAlign;
    }
    y.delta = y.offset;
  }
  program_.delta_elements = program_.example_elements;
}

void ParsedProgram::plan_gradients() {
  std::vector<bool> written(values_.size(), false);
  std::set<int64_t> parameters;
  program_.writes_once = true;
  // Whether it was written before; marks it as written.
  const auto seen_value = [&](int v) {
    const bool before = written[v];
    written[v] = true;
    return before;
  };
  const auto seen_parameter = [&](int64_t parameter) {
    if (!is_learned(parameter)) return false;
    const bool is_new = parameters.insert(parameter).second;
    program_.writes_once = program_.writes_once && is_new;
    return !is_new;
  };
  for (auto i = instructions_.rbegin(); i != instructions_.rend(); ++i) {
    i->adds_to_x = seen_value(i->x);
    if (i->x2 >= 0) i->adds_to_x2 = seen_value(i->x2);
    i->adds_to_weight = seen_parameter(i->weight);
    i->adds_to_bias = seen_parameter(i->bias);
  }
}

// Of parameters with a row for each step a pass writes one row, another one at another step.
void ParsedProgram::find_unwritten() {
  std::map<int64_t, int64_t> written;  // begin, end
  const auto writes = [&](int64_t parameter, int64_t size) {
    if (is_learned(parameter)) written[parameter] = std::max(written[parameter], parameter + size);
  };
  for (const auto& i : instructions_) {
    program_.has_rows |= i.parameter_rows > 1;
    if (i.parameter_rows > 1) continue;
    writes(i.weight, weight_size(i));
    writes(i.bias, i.outputs);
  }
  int64_t end = 0;  // of what was seen
  const auto leave_out_until = [&](int64_t begin) {
    // No part has adapted and shared parameters.
    const int64_t middle = std::clamp(program_.adapted, end, std::max(begin, end));
    if (middle > end) unwritten_.push_back({end, middle - end});
    if (begin > middle) unwritten_.push_back({middle, begin - middle});
  };
  for (const auto& [begin, stop] : written) {
    leave_out_until(begin);
    end = std::max(end, stop);
  }
  leave_out_until(program_.parameters);
  program_.unwritten = unwritten_.data();
  program_.unwritten_count = static_cast<int>(unwritten_.size());
}

void ParsedProgram::pair_activations() {
  for (size_t k = 0; k < instructions_.size(); ++k) {
    Instruction& i = instructions_[k];
    if (i.op != Opcode::kLinear && i.op != Opcode::kConvolution) continue;
    const auto* next = k + 1 < instructions_.size() ? &instructions_[k + 1] : nullptr;
    const auto* previous = k > 0 ? &instructions_[k - 1] : nullptr;
    i.with_next = next && next->op == Opcode::kActivation && next->x == i.y;
    i.with_previous = previous && previous->op == Opcode::kActivation && previous->y == i.x;
  }
}

// Lets a convolution compute the moments of a batch norm that follows at once.
void ParsedProgram::pair_norms() {
  for (size_t k = 0; k < instructions_.size(); ++k) {
    Instruction& i = instructions_[k];
    i.normed = -1;
    if (k == 0 || !is_batch_norm(i)) continue;
    Instruction& previous = instructions_[k - 1];
    i.has_moments = previous.op == Opcode::kConvolution && previous.y == i.x;
    if (i.has_moments) previous.normed = i.y;
  }
}

void ParsedProgram::fuse_bands() {
  for (size_t k = 0; k + 1 < instructions_.size(); ++k) {
    Instruction& i = instructions_[k];
    i.is_fused = i.op == Opcode::kConvolution && i.normed >= 0 && instructions_[k + 1].max_pool &&
                 !values_[i.x].learns && readers_[i.y] == 1 && i.conv.is_recompute_cheap();
  }
  lay_out_values();
}

void ParsedProgram::share_deltas() {
  // Gradients of values in one place, such as a ReLU's input and output, stay in one place.
  std::map<int64_t, Lifetime> groups;
  const auto uses = [&](int v, int instruction) {
    if (v > 0) groups[values_[v].offset].include(instruction);
  };
  for (int k = 0; k < static_cast<int>(instructions_.size()); ++k) {
    const Instruction& i = instructions_[k];
    uses(i.x, k);
    uses(i.x2, k);
    if (i.is_fused) continue;
    uses(i.y, k);
    // The instruction before may be part of the same step, and the next one too.
    uses(i.y, k - 1);
    // Behind the gradient are a norm's sums; what other layers keep beside a value is no gradient.
    const int64_t extra = i.op == Opcode::kNorm ? 4 * i.inputs : 0;
    const int64_t size = ceil_div(values_[i.y].elements + extra, kValueAlign) * kValueAlign;
    auto& group = groups[values_[i.y].offset];
    group.size = std::max(group.size, size);
  }
  program_.delta_elements = place(groups);
  for (const auto& i : instructions_) values_[i.y].delta = groups[values_[i.y].offset].place;
}

void ParsedProgram::add_input_tangent() {
  for (auto& value : values_) value.adapts = true;
  values_[0].offset = program_.example_elements;
}

}  // namespace fastmeta
