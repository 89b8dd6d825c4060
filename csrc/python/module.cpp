// Python module: loads the ops into torch.ops.fastmeta, and tells how they were built.
#include <pybind11/pybind11.h>
#include <torch/csrc/Exceptions.h>
#include <torch/version.h>

#include "api/fastmeta.h"
#include "common/cpu/kept_pages.h"
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
  // Wrapped where an error may come: the limit that the environment gives may be no number.
  m.doc() = "Loads the fastmeta ops into torch.ops.fastmeta.";
  m.def("build_info", &build_info, "How this extension was compiled.");
  m.def("release_memory", torch::wrap_pybind_function(&fastmeta::release_memory),
        "Gives back the host memory that fastmeta keeps; returns the number of bytes.");
  m.def("begin_keeping_pages", torch::wrap_pybind_function(&fastmeta::begin_keeping_pages),
        "From here on, large CPU tensors of this thread take memory that earlier ones gave back.");
  m.def("end_keeping_pages", &fastmeta::end_keeping_pages, "Ends the last such scope.");
  fastmeta::bind_prepared_step(m);
}
