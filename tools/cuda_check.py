"""Compile the CUDA sources with all warnings as errors; fail if a kernel spills registers, or if
a kernel that benchmarks/gpu/kernels.txt names is not compiled.

    python -m tools.cuda_check               # every source for every architecture
    python -m tools.cuda_check --arch sm_90
    python -m tools.cuda_check --daily       # half of the sources, each for one architecture

nvcc compiles every .cu and g++ checks every *_cuda.cpp; neither needs a GPU or a torch with CUDA.
The date of the commit and the name of a source choose its days and its architecture of the day.
Only a check of all sources looks for missing kernels.

Exit status: 0 all is well; 1 a source does not compile, a kernel spills or is missing; 3 there is
no nvcc.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tools.build_plan import planned
from tools.commit_date import date_of_commit
from tools.ninja_build import BuildError, Edge, run_ninja

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = ["sm_80", "sm_90", "sm_120"]
SOURCES = ROOT / "csrc"
LISTED = ROOT / "benchmarks" / "gpu" / "kernels.txt"  # what `make gpu` looks for
DEFAULT_TOOLKIT = "/usr/local/cuda"
NO_NVCC = 3

# ptxas writes the report to stderr, and only then: it is the output, the object a by-product.
RULES = {
    "kernels": "$nvcc $flags -MD -MF $out.d -c -o $out.o $in > $out.new 2>&1"
    " && mv $out.new $out || { cat $out.new; exit 1; }",
    "binding": "$cxx $flags -MD -MF $out.d -fsyntax-only $in && touch $out",
}


class ToolkitMissing(RuntimeError):
    """Raised if there is no nvcc; the message lists the places that were searched."""


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit: its nvcc, and the folders of its headers."""

    nvcc: str
    include_folders: tuple[str, ...]


@dataclass(frozen=True)
class Usage:
    """Resources of one function, as ptxas reports them; sizes in bytes.

    `registers` and `shared` are None for a device function that was not inlined: its callers have
    them. Its stack frame and spills are its own.
    """

    name: str
    registers: int | None
    shared: int | None
    stack: int
    spill_stores: int
    spill_loads: int


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    arch: str
    source: str
    usage: Usage


def find_toolkit() -> Toolkit:
    """Find the toolkit in CUDA_HOME, else by the nvcc on PATH, else in /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME")
    folders = [f"{home}/bin"] if home else []
    folders += [os.environ.get("PATH", os.defpath), f"{DEFAULT_TOOLKIT}/bin"]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(folders))
    if nvcc is None:
        raise ToolkitMissing(
            "the CUDA sources were not checked: there is no nvcc in CUDA_HOME/bin, on PATH "
            f"or in {DEFAULT_TOOLKIT}/bin"
        )
    return real_toolkit(nvcc)


def real_toolkit(nvcc: str) -> Toolkit:
    """The folder of nvcc itself, behind wrappers and links, so that another version is noticed."""
    command = [nvcc, "--dryrun", "-E", "-x", "cu", os.devnull]
    plan = subprocess.run(command, capture_output=True, text=True).stderr
    here = re.search(r"^#\$ _HERE_=(.+)$", plan, re.MULTILINE)
    includes = re.search(r"^#\$ INCLUDES=(.*)$", plan, re.MULTILINE)
    if not (here and includes):
        raise BuildError(f"{shlex.join(command)} does not say where its toolkit is:\n{plan}")
    folders = [Path(word.removeprefix("-I")).resolve() for word in shlex.split(includes[1])]
    return Toolkit(str(Path(here[1]).resolve() / "nvcc"), tuple(map(str, folders)))


def kernel_edge(toolkit: Toolkit, sources: Path, source: Path, arch: str) -> Edge:
    flags = [*planned("nvcc_flag"), f"-arch={arch}", "-I", str(sources)]
    flags += ["-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra", "-Xptxas", "-v"]
    output = f"{source.relative_to(sources).as_posix()}.{arch}.ptxas"
    variables = {"nvcc": shlex.quote(toolkit.nvcc), "flags": shlex.join(flags)}
    return Edge(output, "kernels", (str(source),), variables)


def binding_edge(toolkit: Toolkit, sources: Path, source: Path) -> Edge:
    from torch.utils.cpp_extension import include_paths

    flags = [*planned("flag"), "-Werror", "-DFASTMETA_CUDA", "-I", str(sources)]
    flags += ["-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE"]  # a torch without CUDA lacks that file
    for folder in [*toolkit.include_folders, *include_paths()]:
        flags += ["-isystem", folder]
    variables = {"cxx": os.environ.get("CXX", "g++"), "flags": shlex.join(flags)}
    output = f"{source.relative_to(sources).as_posix()}.checked"
    return Edge(output, "binding", (str(source),), variables)


def chosen(source: Path, archs: list[str], day: str) -> list[str]:
    """The architectures for which a source is compiled: all, or on half of the days one of them."""
    if not day:
        return archs
    digest = hashlib.sha256(f"{source.name} {day}".encode()).digest()
    number, skips = divmod(int.from_bytes(digest[:8], "big"), 2)
    return [] if skips else [archs[number % len(archs)]]


def compile_all(
    toolkit: Toolkit, sources: Path, archs: list[str], day: str, folder: Path, jobs: int | None
) -> tuple[list[Row], str]:
    """Compile the changed sources; returns the rows of the table and a line of summary."""
    start = time.monotonic()
    found = sorted(sources.rglob("*.cu"))
    kernels = [(source, arch) for source in found for arch in chosen(source, archs, day)]
    bindings = sorted(sources.rglob("*_cuda.cpp"))
    kernel_edges = [kernel_edge(toolkit, sources, *kernel) for kernel in kernels]
    edges = kernel_edges + [binding_edge(toolkit, sources, binding) for binding in bindings]
    output = run_ninja(folder, RULES, edges, jobs)
    rows = []
    for (source, arch), edge in zip(kernels, kernel_edges, strict=True):
        name = source.relative_to(sources).as_posix()
        rows += [Row(arch, name, usage) for usage in read_report(folder / edge.output)]
    compiled = len(re.findall(r"^\[\d+/\d+\]", output, re.MULTILINE))
    seconds = time.monotonic() - start
    return rows, (
        f"{len(kernels)} compilations of kernels and {len(bindings)} of bindings are up to date; "
        f"{compiled} ran now, {seconds:.0f} s"
    )


def read_report(path: Path) -> list[Usage]:
    try:
        return parse_ptxas(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BuildError(f"{path}: {error}") from error


PROPERTIES = re.compile(
    r"Function properties for (?P<name>\S+)\n"
    r"\s*(?P<stack>\d+) bytes stack frame, "
    r"(?P<spill_stores>\d+) bytes spill stores, (?P<spill_loads>\d+) bytes spill loads"
    r"(?:\n.*: Used (?P<registers>\d+) registers(?:.*?(?P<shared>\d+) bytes smem)?)?"
)


def parse_ptxas(report: str) -> list[Usage]:
    """Parse the report of `ptxas -v` on one source and one architecture: usage by function.

    Raises:
        ValueError: the report names no kernel, or one without its registers and spills.
    """
    usages = []
    for match in PROPERTIES.finditer(report):
        numbers = {k: int(v) for k, v in match.groupdict().items() if v and k != "name"}
        shared = numbers.pop("shared", 0) if "registers" in numbers else None
        usages.append(Usage(match["name"], numbers.pop("registers", None), shared, **numbers))
    kernels = re.findall(r"Compiling entry function '(\S+)'", report)
    described = [usage.name for usage in usages if usage.registers is not None]
    if not kernels or kernels != described:
        raise ValueError(f"expected the properties of {kernels or 'a kernel'}, got {described}")
    return list(dict.fromkeys(usages))


def readable(name: str) -> str:
    """A demangled name without return type, project namespaces and parameter list."""
    for noise in ("(anonymous namespace)::", "<unnamed>::", "fastmeta::"):
        name = name.replace(noise, "")
    start, depth = 0, 0
    for i, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if depth == 0 and letter == " ":
            start = i + 1
        if depth == 0 and letter == "(":
            name = name[:i]
            break
    return re.sub("> (?=>)", ">", name[start:])


def demangled(names: list[str]) -> list[str]:
    """Demangle the names by c++filt; without it they are unchanged."""
    if not names or not shutil.which("c++filt"):
        return names
    text = "\n".join(names) + "\n"
    result = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True)
    return [readable(line) for line in result.stdout.splitlines()]


def table(rows: list[Row]) -> str:
    """One line a function with all architectures; `-` for a number that its callers have."""
    cells = [("arch", "registers", "shared", "stack", "spill stores", "loads", "source", "kernel")]
    named = zip(rows, demangled([row.usage.name for row in rows]), strict=True)
    for row, name in sorted(named, key=lambda pair: (pair[0].source, pair[1])):
        u = row.usage
        numbers = (u.registers, u.shared, u.stack, u.spill_stores, u.spill_loads)
        shown = ("-" if number is None else str(number) for number in numbers)
        cells.append((row.arch, *shown, row.source, name))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    numeric = range(1, 6)
    lines = (
        "  ".join(
            cell.rjust(width) if i in numeric else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    )
    return "\n".join(line.rstrip() for line in lines)


def judge(rows: list[Row]) -> int:
    """Print the table; returns 1, and names the rows, if any of them spills."""
    print(table(rows))
    spilling = [row for row in rows if row.usage.spill_stores or row.usage.spill_loads]
    if spilling:
        print(f"fastmeta: {len(spilling)} of {len(rows)} spill registers:", file=sys.stderr)
        print(table(spilling), file=sys.stderr)
    return 1 if spilling else 0


def missing(rows: list[Row], listed: list[str]) -> list[str]:
    """The listed kernels that no source has; none without c++filt, which makes names readable."""
    if not shutil.which("c++filt"):
        return []
    compiled = demangled([row.usage.name for row in rows])
    return sorted(set(listed) - set(compiled))


def judge_names(rows: list[Row], listed: list[str]) -> int:
    """Print the listed kernels that were not compiled; returns 1 if there are any."""
    names = missing(rows, listed)
    if names:
        print(f"fastmeta: nvcc compiled none of {LISTED.name}'s", file=sys.stderr)
        print(*names, sep="\n", file=sys.stderr)
    return 1 if names else 0


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.cuda_check", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--arch", action="append", help=f"default: {' '.join(ARCHITECTURES)}")
    parser.add_argument(
        "--daily", action="store_true", help="half of the sources, each for one architecture"
    )
    parser.add_argument("--jobs", type=int, help="compilations at once (default: as ninja chooses)")
    parser.add_argument("--build-dir", type=Path, default=ROOT / "build" / "cuda_check")
    parser.add_argument("--sources", type=Path, default=SOURCES, help="default: csrc")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    archs = options.arch or ARCHITECTURES
    day = date_of_commit() if options.daily else ""
    try:
        toolkit = find_toolkit()
        rows, summary = compile_all(
            toolkit, options.sources.resolve(), archs, day, options.build_dir, options.jobs
        )
    except ToolkitMissing as error:
        print(f"fastmeta: {error}", file=sys.stderr)
        return NO_NVCC
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    status = judge(rows)
    if options.sources.resolve() == SOURCES and not options.daily:
        status = max(status, judge_names(rows, LISTED.read_text().splitlines()))
    print(f"{toolkit.nvcc}: {summary}")
    return status


if __name__ == "__main__":
    sys.exit(main())
