// Plans of calls in one kernel, for test_block_plans.py.
#include <functional>
#include <iterator>
#include <vector>

#include "common/recently_used.h"
#include "task_program/cuda/block_plan.cuh"

namespace fastmeta {
namespace {

// A linear layer, 3 -> 2 with a bias, and the meta-step of one inner step on 4 + 4 examples.
class LinearCall {
 public:
  LinearCall() {
    auto& i = instruction_;
    i.op = Opcode::kLinear;
    i.x2 = i.normed = -1;
    i.y = 1;
    i.bias = 6;
    i.mean = i.variance = kNoParameter;
    i.inputs = 3;
    i.outputs = 2;
    Program& p = args.program;
    p.instructions = &i;
    p.instruction_count = 1;
    p.values = values_;
    p.value_count = 2;
    p.output = 1;
    p.parameters = p.adapted = 8;
    p.example_elements = p.delta_elements = 4;
    p.writes_once = true;
    p.loss = {LossKind::kMse, 0, 0, true, 1};
    args.kind = OpKind::kMeta;
    args.dtype = Dtype::kFloat;
    args.tasks = 2;
    args.code = code.data();
    args.code_words = 3;
    args.lr = code.data();  // is not read
    args.options.steps = 2;
    args.options.keeps_steps = args.keeps_states = args.gradient = true;
    args.support.count = args.query.count = 4;
  }
  LinearCall(const LinearCall&) = delete;

  std::vector<int64_t> code{1, 2, 3};
  OpArguments args{};

 private:
  Instruction instruction_{};
  Value values_[2] = {{3, 0, 0, 0, false, false}, {2, 0, 0, 0, true, true}};
};

using Change = std::function<void(LinearCall&)>;

// What another plan is needed for.
const Change kChanges[] = {
    [](LinearCall& c) { c.code[1] = 7; },
    [](LinearCall& c) { c.args.code_words = 2; },
    [](LinearCall& c) { c.args.kind = OpKind::kGradient; },
    [](LinearCall& c) { c.args.support.count = 5; },
    [](LinearCall& c) { c.args.query.count = 5; },
    [](LinearCall& c) { c.args.options.steps = 1; },
    [](LinearCall& c) { c.args.options.first_order = true; },
    [](LinearCall& c) { c.args.options.keeps_steps = false; },
    [](LinearCall& c) { c.args.keeps_states = false; },
    [](LinearCall& c) { c.args.gradient = false; },
    [](LinearCall& c) { c.args.lr_per_parameter = true; },
    [](LinearCall& c) { c.args.lr_step_stride = 1; },
    [](LinearCall& c) { c.args.options.lr_grad = true, c.args.grad_lr = c.code.data(); },
    [](LinearCall& c) { c.args.grad_support = c.code.data(); },
    [](LinearCall& c) { c.args.grad_query = c.code.data(); },
    [](LinearCall& c) { c.args.support.weight = c.code.data(); },
    [](LinearCall& c) { c.args.query.weight = c.code.data(); },
    [](LinearCall& c) { c.args.scale = 0.5; },
    [](LinearCall& c) { c.args.step_weights = {0.5, 0.5}; },
    [](LinearCall& c) { c.args.step_weights = {0.25, 0.5}; },
};

// What it is not needed for.
const Change kSameChanges[] = {
    [](LinearCall&) {},
    [](LinearCall& c) { c.args.tasks = 9; },
    [](LinearCall& c) { c.args.theta_stride = 8; },
    [](LinearCall& c) { c.args.lr_step_stride = 0; },
};

bool has_plan_of_first(const Change& change) {
  LinearCall first, other;
  change(other);
  const auto plan = block_plan<float>(first.args), others = block_plan<float>(other.args);
  return plan && others && plan == others && plan == block_plan<float>(first.args);
}

}  // namespace
}  // namespace fastmeta

extern "C" {

int count_of_changes() { return static_cast<int>(std::size(fastmeta::kChanges)); }
int count_of_same_changes() { return static_cast<int>(std::size(fastmeta::kSameChanges)); }

// Whether a call with the change has the plan of the call without it.
bool has_same_plan(int change, bool of_same) {
  return fastmeta::has_plan_of_first(
      (of_same ? fastmeta::kSameChanges : fastmeta::kChanges)[change]);
}

// Whether a call has a plan in a block with so much shared memory as the device says.
bool has_plan() {
  fastmeta::LinearCall call;
  return fastmeta::block_plan<double>(call.args) != nullptr;
}

// How many values are made for keys that are asked for one after the other, if two are kept.
int count_made(const int64_t* keys, int count) {
  fastmeta::RecentlyUsed<int64_t, int64_t> kept(2);
  int made = 0;
  for (int i = 0; i < count; ++i) {
    const int64_t value = kept.get(keys[i], [&] { return ++made, 10 * keys[i]; });
    if (value != 10 * keys[i]) return -1;
  }
  return made;
}
}
