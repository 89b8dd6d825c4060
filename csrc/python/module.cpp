// Python module: loads the ops into torch.ops.fastmeta, and tells how they were built.
#include <pybind11/pybind11.h>
#include <torch/version.h>

#include "common/cpu/workspace.h"
#include "python/fast_path.h"

namespace {

// Marker text: fastmeta/core/backend.py looks for it in the file before loading it.
[[gnu::used]] constexpr char kCompiledWith[] = "fastmeta compiled with torch " TORCH_VERSION;

pybind11::dict build_info() {
  pybind11::dict info;
  info["compiler"] = "g++ " __VERSION__;
  info["torch"] = TORCH_VERSION;
  info["isa"] = FASTMETA_ISA;
#ifdef FASTMETA_CUDA
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Loads the fastmeta ops into torch.ops.fastmeta.";
  m.def("build_info", &build_info, "How this extension was compiled.");
  m.def("release_workspaces", &fastmeta::release_workspaces,
        "Gives back the memory that CPU kernels keep; returns the number of bytes.");
  fastmeta::bind_prepared_step(m);
}
