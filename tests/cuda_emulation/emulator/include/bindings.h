// What bindings include of PyTorch, compiled once for all of them: most of their time otherwise.
// It has no include guard: of what is compiled by itself, g++ takes one for a mistake.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>
