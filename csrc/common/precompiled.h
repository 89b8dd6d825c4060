// What most sources include of PyTorch, which takes g++ a third to two thirds of a source's time to
// read. setup.py compiles it first. Each source still includes what it uses: CMake builds without it.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>
