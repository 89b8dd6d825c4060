// A module's own parameters in one arena, and the op on it.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>

#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

namespace fastmeta {

// Copies all parameters into one arena [P].
inline at::Tensor joined(at::TensorList parameters) {
  int64_t count = 0;
  bool can_copy = true;  // no tensor without memory, as while torch.compile traces
  for (const auto& p : parameters) {
    count += p.numel();
    can_copy = can_copy && p.device().is_cpu() && p.is_contiguous() &&
               !p.unsafeGetTensorImpl()->is_python_dispatch();
  }
  if (!can_copy) {
    std::vector<at::Tensor> flat;
    for (const auto& p : parameters) flat.push_back(p.reshape({-1}));
    return at::cat(flat);
  }
  auto arena = at::empty({count}, parameters[0].options());
  auto* target = static_cast<char*>(arena.mutable_data_ptr());
  for (const auto& p : parameters) {
    std::memcpy(target, p.const_data_ptr(), p.nbytes());
    target += p.nbytes();
  }
  return arena;
}

// The meta-gradient op, typed.
inline auto meta_gradient_op() {
  using at::Tensor;
  using Op = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>(
      const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
      const Tensor&, const Tensor&, at::ArrayRef<double>, int64_t, bool, bool, bool, bool, bool,
      bool, const std::optional<Tensor>&, const std::optional<Tensor>&);
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastmeta::task_program_meta_gradient", "")
                             .typed<Op>();
  return op;
}

// The meta-loss op, which autograd knows, typed.
inline auto meta_loss_op() {
  using at::Tensor;
  using Op = std::tuple<Tensor, Tensor>(const Tensor&, at::TensorList, const Tensor&, const Tensor&,
                                        const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                        at::ArrayRef<double>, int64_t, bool, bool,
                                        const std::optional<Tensor>&, const std::optional<Tensor>&);
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastmeta::task_program_meta_loss", "")
                             .typed<Op>();
  return op;
}

}  // namespace fastmeta
