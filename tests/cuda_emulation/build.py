"""Compiles the emulator, the CUDA sources for it, and the kernels that test it."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pybind11
from torch.utils.cpp_extension import include_paths, library_paths

from tools.build_plan import planned
from tools.ninja_build import BuildError, Edge, bring_up_to_date, run_ninja

HERE = Path(__file__).resolve().parent
EMULATOR = HERE / "emulator"
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "cuda_emulation"

RULES = {
    "compile": "g++ $flags -MD -MF $out.d -x c++ -c $in -o $out",
    "precompile": "g++ $flags -MD -MF $out.d -x c++-header -c $in -o $out",
    "link": "g++ -shared -fsanitize=address,undefined -o $out $in $flags",
}

COMMON = ["-std=c++20", "-g1", "-fPIC", "-Wall", "-Wextra", "-Werror"]
RUNTIME = [*COMMON, "-O2", "-fno-semantic-interposition", f"-I{EMULATOR}"]
# pybind11 before the one that torch brings: objects of the extension share its types.
EMULATED = [
    *(*COMMON, "-O1", "-Wno-unknown-pragmas", "-Wno-unused-parameter"),
    *("-DFASTMETA_CUDA", "-DFASTMETA_EMULATED", '-DFASTMETA_ISA="emulated"'),
    *(f"-I{EMULATOR / 'include'}", f"-I{EMULATOR}", f"-I{CSRC}"),
    *(f"-isystem{path}" for path in (pybind11.get_include(), *include_paths())),
    f"-isystem{sysconfig.get_paths()['include']}",
]
# Nothing of them is slow, and no line of theirs is reported.
BINDING = [*EMULATED, "-O0", "-g0"]
KERNEL = [
    *(*EMULATED, "-include", "cuda_runtime.h"),
    # So small, unless a test says otherwise, that work is done in several turns.
    "-DFASTMETA_CHUNK=::emulator::chunk()",
    "-DFASTMETA_TASK_BYTES=::emulator::task_bytes()",
    # Statics of templates stay a library's own: several libraries have a block_sum.
    "-fno-gnu-unique",
    *("-fsanitize=thread,undefined", "-fno-sanitize-recover=all"),
    *("--param", "tsan-instrument-func-entry-exit=0"),
]


def sanitizer_libraries() -> list[str]:
    """The libraries that must be in a process from its start; raises RuntimeError without them."""
    if not shutil.which("g++"):
        raise RuntimeError("g++ is not on PATH")
    found = []
    for name in ("libasan.so", "libubsan.so"):
        path = subprocess.run(
            ["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True
        ).stdout.strip()
        if not Path(path).is_absolute():
            raise RuntimeError(f"g++ has no {name}; install its sanitizers")
        found.append(path)
    return found


def objects(
    sources: list[Path], root: Path, flags: list[str], after: tuple[str, ...] = ()
) -> list[Edge]:
    """An edge that compiles each source, once the files `after` are made.

    The object's path is the source's below `root`.
    """
    return [
        Edge(f"{source.relative_to(root)}.o", "compile", (str(source),), _flags(flags), after)
        for source in sources
    ]


def is_cpu(source: Path) -> bool:
    """Whether a C++ source holds CPU kernels, which are not emulated."""
    if source.name in ("workspace.cpp", "kept_pages.cpp"):  # the Python module releases both
        return False
    return source.name.endswith("_cpu.cpp") or source.parent.name == "cpu"


def knows_cuda(source: Path) -> bool:
    """Whether what a C++ source does depends on the emulator's macros."""
    return source.name.endswith("_cuda.cpp") or source.name in ("module.cpp", "fastmeta.cpp")


def extension_objects(sources: list[Path]) -> list[str]:
    """Objects of the compiled extension, brought up to date.

    Raises BuildError where the extension was never compiled here.
    """
    folder = ROOT / planned("objects")[0]
    if not (folder / "build.ninja").exists():
        raise BuildError("the extension is not compiled: `make .venv/.built` first")
    found = [str(folder / source.relative_to(ROOT).with_suffix(".o")) for source in sources]
    bring_up_to_date(folder, found)
    return found


def library(name: str, inputs: list[str], flags: list[str]) -> Edge:
    """The edge that links objects into a library."""
    return Edge(name, "link", tuple(inputs), _flags(flags))


def _flags(flags: list[str]) -> dict[str, str]:
    return {"flags": shlex.join(flags)}


def build() -> None:
    """Makes libemulator.so, _C.so (the ops) and kernels.so (for test_emulator.py) in BUILD.

    Raises BuildError with the compiler's message.
    """
    runtime = objects(sorted(EMULATOR.glob("*.cpp")), HERE, RUNTIME)
    kernels = objects(sorted(CSRC.rglob("*.cu")), CSRC, KERNEL)
    header = Edge(
        "bindings.h.gch", "precompile", (str(EMULATOR / "include/bindings.h"),), _flags(BINDING)
    )
    included = [f"-I{BUILD}", "-include", "bindings.h"]
    sources = sorted(path for path in CSRC.rglob("*.cpp") if not is_cpu(path))
    shared = extension_objects([path for path in sources if not knows_cuda(path)])
    own = list(filter(knows_cuda, sources))
    bindings = objects(own, CSRC, [*included, *BINDING], after=(header.output,))
    own_kernels = objects(sorted(EMULATOR.glob("*.cu")), HERE, KERNEL)
    emulator = library("libemulator.so", [edge.output for edge in runtime], ["-Wl,-Bsymbolic"])
    libraries = {
        "_C.so": [*(e.output for e in [*kernels, *bindings]), *shared],
        "kernels.so": [e.output for e in own_kernels],
    }
    torch = [f"{kind}{path}" for path in library_paths() for kind in ("-L", "-Wl,-rpath,")]
    torch += ["-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python"]
    links = [
        library(name, [*inputs, emulator.output], [f"-Wl,-rpath,{BUILD}", *torch])
        for name, inputs in libraries.items()
    ]
    run_ninja(BUILD, RULES, [header, *runtime, *kernels, *bindings, *own_kernels, emulator, *links])
