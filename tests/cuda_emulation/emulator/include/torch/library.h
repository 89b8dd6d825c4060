// Here the CUDA implementation of an op serves CPU tensors.
#pragma once

#include_next <torch/library.h>

#undef TORCH_LIBRARY_IMPL
#define EMULATED_KEY_CUDA CPU
#define EMULATED_KEY_CompositeImplicitAutograd CompositeImplicitAutograd
#define EMULATED_LIBRARY_IMPL(ns, key, m) _TORCH_LIBRARY_IMPL(ns, key, m, C10_UID)
#define TORCH_LIBRARY_IMPL(ns, key, m) EMULATED_LIBRARY_IMPL(ns, EMULATED_KEY_##key, m)
