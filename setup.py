"""Builds fastmeta; everything that is not about compiling stands in pyproject.toml.

Environment:
  FASTMETA_NO_EXT=1      pure PyTorch: compile nothing
  FASTMETA_CUDA=0|1      leave the CUDA kernels out, or insist on them (default: they are built
                         where torch has CUDA and nvcc is found)
  FASTMETA_ISA=avx512|avx2|portable
                         vector instructions of the CPU kernels (default: this machine's)
  TORCH_CUDA_ARCH_LIST   GPU architectures, as everywhere in PyTorch

`python setup.py plan` prints sources, flags, the folder of the objects and the kernels' own files,
one per line: CMakeLists.txt builds from it, and `make cuda-check` compiles with its flags. A
`python_source` is of the Python module alone, a `source` also of the C++ library.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent

ISA_FLAGS = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "portable": [],
}
ISA_CAPABILITY = {"avx512": "AVX512", "avx2": "AVX2", "portable": "DEFAULT"}
NVCC_FLAGS = ["-O3", "-std=c++20", "-lineinfo", "-DFASTMETA_CUDA"]  # beside those torch adds


def stop(missing: str) -> None:
    """A failed build says in one line what is missing."""
    sys.exit(f"fastmeta: {missing} (or set FASTMETA_NO_EXT=1 for the pure-PyTorch package)")


def flag(name: str) -> bool | None:
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        sys.exit(f"fastmeta: {name} must be 0 or 1, got {value!r}")
    return None if value == "" else value == "1"


def import_torch():
    try:
        import torch
    except ImportError:
        stop("torch is not installed where the build runs; install it and use --no-build-isolation")
    if tuple(int(x) for x in torch.__version__.split("+")[0].split(".")[:2]) < (2, 11):
        stop(f"torch >= 2.11 is needed, found {torch.__version__}")
    return torch


def with_cuda(torch) -> bool:
    from torch.utils.cpp_extension import CUDA_HOME

    wanted = flag("FASTMETA_CUDA")
    nvcc = CUDA_HOME and shutil.which("nvcc", path=f"{CUDA_HOME}/bin")
    if wanted and not torch.version.cuda:
        stop(f"FASTMETA_CUDA=1, but torch {torch.__version__} was built without CUDA")
    if wanted and not nvcc:
        stop("FASTMETA_CUDA=1, but there is no nvcc; set CUDA_HOME")
    return bool(torch.version.cuda and nvcc) if wanted is None else wanted


def isa(torch) -> str:
    wanted = os.environ.get("FASTMETA_ISA")
    if wanted and wanted not in ISA_FLAGS:
        stop(f"FASTMETA_ISA must be one of {', '.join(ISA_FLAGS)}, got {wanted!r}")
    found = torch.backends.cpu.get_cpu_capability().lower()
    return wanted or (found if found in ISA_FLAGS else "portable")


def sources(cuda: bool) -> list[str]:
    """The one recursive glob of csrc/: all C++, and with CUDA all .cu and their bindings."""
    found = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*.c*"))
    return [s for s in found if s.endswith((".cpp", ".cu")) and (cuda or not is_cuda(s))]


def is_cuda(source: str) -> bool:
    return source.endswith((".cu", "_cuda.cpp"))


@functools.cache
def is_torch_free(file: str) -> bool:
    """Whether a file of csrc, with what it includes, compiles without torch."""
    text = (ROOT / "csrc" / file).read_text(encoding="utf-8")
    includes = re.findall(r"^#include ([<\"])([^>\"]+)", text, re.MULTILINE)
    return all(
        is_torch_free(name)
        if quote == '"'
        else not name.startswith(("ATen/", "c10/", "torch/", "pybind11/"))
        for quote, name in includes
    )


def kernel_files() -> list[str]:
    """Kernels and their headers that C++ and CUDA programs use without torch."""
    csrc = ROOT / "csrc"
    found = sorted(p.relative_to(csrc).as_posix() for p in csrc.rglob("*.*"))
    return [f for f in found if f.endswith((".h", ".cuh", ".cu")) and is_torch_free(f)]


def objects_folder(torch) -> str:
    """One for all builds (in place, editable, wheel, CMake), so that each source compiles once."""
    return f"build/objects-{sys.implementation.cache_tag}-torch{torch.__version__}"


def compile_flags(chosen_isa: str, cuda: bool) -> list[str]:
    capability = ISA_CAPABILITY[chosen_isa]
    return [
        # -g0 undoes the -g of Python's own flags, which takes a third of the compiler's time.
        *("-g0", "-O3", "-std=c++20", "-fvisibility=hidden"),
        *("-fno-math-errno", "-fno-trapping-math"),
        *(
            "-Wall",
            "-Wextra",
            "-Wno-unused-parameter",
            "-Wno-unknown-pragmas",
            # GCC 12 warns of its own AVX-512 intrinsics.
            "-Wno-maybe-uninitialized",
            "-Wno-uninitialized",
        ),
        *ISA_FLAGS[chosen_isa],
        *(f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"),
        f'-DFASTMETA_ISA="{chosen_isa}"',
        *(["-DFASTMETA_CUDA"] if cuda else []),
        "-fopenmp",
    ]


def find_compiler() -> None:
    compiler = os.environ.get("CXX", "g++")
    if not shutil.which(compiler.split()[0]):
        stop(f"no C++ compiler: {compiler} is not on PATH; install g++")
    if not shutil.which("ninja"):
        stop("ninja is not on PATH; pip install ninja")


def extension():
    find_compiler()
    torch = import_torch()
    try:
        import pybind11
    except ImportError:
        stop("pybind11 is not installed where the build runs; pip install pybind11")
    from torch.utils.cpp_extension import (
        BuildExtension,
        CppExtension,
        CUDAExtension,
        check_compiler_is_gcc,
        get_cxx_compiler,
        include_paths,
    )

    cuda = with_cuda(torch)
    # g++ gives no warnings from headers of the system, nor from torch's when they are precompiled.
    torch_headers = [f"-isystem{path}" for path in include_paths()]
    cxx = [*torch_headers, *compile_flags(isa(torch), cuda)]
    module = (CUDAExtension if cuda else CppExtension)(
        "fastmeta._C",
        sources(cuda),
        include_dirs=[str(ROOT / "csrc"), pybind11.get_include()],
        extra_compile_args={"cxx": cxx, "nvcc": NVCC_FLAGS},
        extra_link_args=["-fopenmp"],
        py_limited_api=False,
    )

    class Build(BuildExtension):
        def finalize_options(self) -> None:
            super().finalize_options()
            self.build_temp = objects_folder(torch)

        def build_extension(self, ext) -> None:
            if check_compiler_is_gcc(get_cxx_compiler()):
                header = self.precompile("csrc/common/precompiled.h", ext)
                ext.extra_compile_args["cxx"] += ["-include", header]
            super().build_extension(ext)

        def precompile(self, header: str, ext) -> str:
            """The header's path in the folder of objects, with its compiled form beside it, which
            g++ takes in the header's place where it was compiled with the same flags."""
            self.compiler.src_extensions.append(".h")
            (compiled,) = self.compiler.compile(
                [header],
                self.build_temp,
                include_dirs=ext.include_dirs,
                extra_postargs=ext.extra_compile_args,
            )
            copy = Path(compiled).with_suffix(".h")
            for link, target in ((copy, ROOT / header), (copy.with_suffix(".h.gch"), compiled)):
                link.unlink(missing_ok=True)
                link.symlink_to(target)
            return str(copy)

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                stop(f"the compiler failed, see its first error above [{error}]")

    return [module], {"build_ext": Build.with_options(use_ninja=True)}


def print_plan() -> None:
    torch = import_torch()
    from torch.utils.cpp_extension import COMMON_NVCC_FLAGS

    cuda = with_cuda(torch)
    for source in sources(cuda):
        kind = "python_source" if source.startswith("csrc/python/") else "source"
        print(kind, source)
    for option in compile_flags(isa(torch), cuda):
        print("flag", option)
    for option in [*COMMON_NVCC_FLAGS, *NVCC_FLAGS]:
        print("nvcc_flag", option)
    print("objects", objects_folder(torch))
    for file in kernel_files():
        print("kernel", file)


if sys.argv[1:] == ["plan"]:
    print_plan()
elif flag("FASTMETA_NO_EXT") or "egg_info" in sys.argv or "sdist" in sys.argv:
    setup()
else:
    modules, commands = extension()
    setup(ext_modules=modules, cmdclass=commands)
