// Parser of the code tensor to a program, checked as far as memory safety needs it.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "task_program/program/program.h"

namespace fastmeta {

class ParsedProgram {
 public:
  // Raises RuntimeError if the code does not follow program.h.
  explicit ParsedProgram(const at::Tensor& code);

  ParsedProgram(const ParsedProgram&) = delete;
  ParsedProgram& operator=(const ParsedProgram&) = delete;

  const Program& program() const { return program_; }

  // Fuses convolutions that are cheap to recompute with the norm and the pool behind them, for
  // executors with fused bands: no gradient of inputs, and the convolution's outputs have no
  // memory.
  void fuse_bands();

  // Lets gradients share memory that are not needed at the same time, for a backward pass that
  // nothing follows.
  void share_deltas();

  // Gives the input a tangent, behind the tangents of the values, and so every value one.
  void add_input_tangent();

 private:
  void read_instruction(const int64_t* words);
  void check_parameter(int64_t parameter, int64_t size) const;
  void drop_unused();
  void count_readers();
  void drop_shifts();
  void fuse_norms();
  void lay_out_values();
  void plan_gradients();
  void find_unwritten();
  void pair_activations();
  void pair_norms();

  std::vector<Value> values_;
  std::vector<Instruction> instructions_;
  std::vector<bool> made_;
  std::vector<int> readers_;
  std::vector<Part> unwritten_;
  Program program_{};
};

}  // namespace fastmeta
