// Binds CachedStep into the Python module.
#pragma once

#include <pybind11/pybind11.h>

namespace fastmeta {

void bind_prepared_step(pybind11::module_& m);

}  // namespace fastmeta
