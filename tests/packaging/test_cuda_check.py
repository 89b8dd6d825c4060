"""The check of the CUDA sources: what it reads, what makes it fail, what it recompiles."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tools import cuda_check
from tools.cuda_check import Row, Usage, parse_ptxas, readable
from tools.ninja_build import BuildError, Edge, manifest, run_ninja

KERNEL = "_ZN8fastmeta12_GLOBAL__N_112weigh_kernelIfLi4EEEvPKT_l"
SLOW = "_ZN8fastmeta12_GLOBAL__N_14slowEPKfi"
REPORT = f"""\
ptxas info    : 24 bytes gmem
ptxas info    : Compiling entry function '{KERNEL}' for 'sm_90'
ptxas info    : Function properties for {KERNEL}
    832 bytes stack frame, 480 bytes spill stores, 2576 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 832 bytes cumulative stack size, 256 bytes smem
ptxas info    : Compile time = 858.902 ms
ptxas info    : Function properties for {SLOW}
    0 bytes stack frame, 332 bytes spill stores, 476 bytes spill loads
ptxas info    : Compiling entry function 'plain' for 'sm_90'
ptxas info    : Function properties for plain
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 107 registers, used 1 barriers, 472 bytes cmem[0]
"""
CLEAN = Usage("plain", registers=107, shared=0, stack=0, spill_stores=0, spill_loads=0)


def test_report_of_ptxas_is_read_whole():
    assert parse_ptxas(REPORT) == [
        Usage(KERNEL, registers=32, shared=256, stack=832, spill_stores=480, spill_loads=2576),
        Usage(SLOW, registers=None, shared=None, stack=0, spill_stores=332, spill_loads=476),
        CLEAN,
    ]


@pytest.mark.parametrize(
    "report",
    ["", REPORT.replace("Used 107", "Took 107"), REPORT.replace("spill loads", "loads")],
    ids=["empty", "registers", "spills"],
)
def test_report_in_an_unknown_form_is_refused(report):
    with pytest.raises(ValueError, match="expected the properties of"):
        parse_ptxas(report)


@pytest.mark.parametrize(
    "name, expected",
    [
        (
            "void fastmeta::(anonymous namespace)::weigh<float, fastmeta::Tile<4, 2> >(float*)",
            "weigh<float, Tile<4, 2>>",
        ),
        ("void fastmeta::pick<(fastmeta::Metric)2, false>(long)", "pick<(Metric)2, false>"),
        ("void fastmeta::<unnamed>::sum<A<B<int> > >(B<int>)", "sum<A<B<int>>>"),
        ("fastmeta::label_range_kernel(long const*, int*)", "label_range_kernel"),
        ("plain", "plain"),
    ],
)
def test_names_are_readable(name, expected):
    assert readable(name) == expected


def test_without_a_spill_the_table_is_all_there_is(capsys):
    assert cuda_check.judge([Row("sm_90", "op/op.cu", CLEAN)]) == 0
    printed = capsys.readouterr()
    row = " ".join(printed.out.splitlines()[1].split())
    assert row == "sm_90 107 0 0 0 0 op/op.cu plain"
    assert printed.err == ""


@pytest.mark.parametrize("spilling", [{"spill_stores": 4}, {"spill_loads": 4}])
def test_a_spill_fails_and_names_its_row(spilling, capsys):
    numbers = {"registers": 255, "shared": 0, "stack": 8, "spill_stores": 0, "spill_loads": 0}
    spiller = Usage("spiller", **{**numbers, **spilling})
    rows = [Row("sm_90", "op/op.cu", CLEAN), Row("sm_120", "op/op.cu", spiller)]
    assert cuda_check.judge(rows) == 1
    printed = capsys.readouterr()
    assert "plain" in printed.out and "spiller" in printed.out
    assert "1 of 2 spill registers" in printed.err
    assert "sm_120" in printed.err and "spiller" in printed.err and "plain" not in printed.err


def test_a_missing_nvcc_is_told_in_one_line_and_by_the_status(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(cuda_check, "DEFAULT_TOOLKIT", str(tmp_path))
    assert cuda_check.main([]) == cuda_check.NO_NVCC
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "there is no nvcc in CUDA_HOME/bin" in error


SPILL = """
__global__ void __launch_bounds__(1024) spill_kernel(float* x) {
  float v[96];
#pragma unroll
  for (int i = 0; i < 96; ++i) v[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 96; ++i) x[i * 1024 + threadIdx.x] = v[i] - 2 * v[95 - i];
}
"""
DEVICE_WARNING = "__global__ void kernel(int* x) { int idle = 3; x[0] = 1; }\n"
HOST_WARNING = "bool smaller(int x, unsigned y) { return x < y; }\n"
FINE = "__global__ void kernel(int* x) { x[0] = 1; }\n"


def test_each_source_has_every_architecture_on_some_day():
    source, archs = Path("op.cu"), cuda_check.ARCHITECTURES
    assert cuda_check.chosen(source, archs, day="") == archs
    days = [f"2026-01-{day:02}" for day in range(1, 29)]
    found = [cuda_check.chosen(source, archs, day) for day in days]
    assert {len(some) for some in found} == {0, 1}
    assert 9 <= sum(map(len, found)) <= 19
    assert {arch for some in found for arch in some} == set(archs)


def check(folder: Path) -> int:
    arguments = ["--sources", str(folder), "--build-dir", str(folder / "build"), "--jobs", "1"]
    return cuda_check.main([*arguments, "--arch", "sm_90"])


@pytest.fixture
def nvcc() -> None:
    try:
        cuda_check.find_toolkit()
    except cuda_check.ToolkitMissing as error:
        pytest.skip(str(error))


@pytest.mark.rotating
@pytest.mark.parametrize(
    "name, source, message",
    [
        ("spill.cu", SPILL, "spill_kernel"),
        ("device.cu", DEVICE_WARNING, '"idle" was declared but never referenced'),
        ("host.cu", HOST_WARNING, "Werror=sign-compare"),
        ("host_cuda.cpp", HOST_WARNING, "Werror=sign-compare"),
        ("empty.cu", "", "expected the properties of a kernel"),
    ],
    ids=["spill", "device_warning", "host_warning", "binding_warning", "no_kernel"],
)
def test_a_planted_fault_fails_the_check(name, source, message, nvcc, tmp_path, capsys):
    (tmp_path / "fine.cu").write_text(FINE)
    (tmp_path / name).write_text(source)
    assert check(tmp_path) == 1
    assert message in capsys.readouterr().err


def test_a_second_check_compiles_nothing_and_prints_the_same_table(nvcc, tmp_path, capsys):
    (tmp_path / "fine.cu").write_text(FINE)
    assert check(tmp_path) == 0
    *first_table, first_summary = capsys.readouterr().out.splitlines()
    assert check(tmp_path) == 0
    *second_table, second_summary = capsys.readouterr().out.splitlines()
    assert len(first_table) == 2 and second_table == first_table
    assert "1 ran now" in first_summary and "0 ran now" in second_summary


def test_a_listed_kernel_that_is_not_compiled_is_named(capsys):
    if not shutil.which("c++filt"):
        pytest.skip("c++filt is not on PATH")
    rows = [Row("sm_90", "a.cu", usage) for usage in parse_ptxas(REPORT)]
    compiled = ["weigh_kernel<float, 4>", "plain"]
    assert cuda_check.judge_names(rows, compiled) == 0
    assert capsys.readouterr().err == ""
    assert cuda_check.judge_names(rows, [*compiled, "weigh_kernel<float, 8>"]) == 1
    assert capsys.readouterr().err.splitlines()[1:] == ["weigh_kernel<float, 8>"]


OBJECT = {"object": "g++ $flags -c -MD -MF $out.d -o $out $in"}


@pytest.fixture
def project(tmp_path) -> tuple[Path, list[Edge]]:
    """Two sources, one of which includes a header, in a folder whose name needs escaping."""
    if not shutil.which("g++"):
        pytest.skip("g++ is not on PATH")
    folder = tmp_path / "a b: $c"
    folder.mkdir()
    (folder / "x.h").write_text("inline int x() { return 1; }\n")
    (folder / "with.cpp").write_text('#include "x.h"\nint with() { return x(); }\n')
    (folder / "without.cpp").write_text("int without() { return 2; }\n")
    names = ("with", "without")
    return folder, [Edge(f"{n} it.o", "object", (str(folder / f"{n}.cpp"),)) for n in names]


def test_ninja_builds_each_output_once(project):
    folder, edges = project
    first = run_ninja(folder / "build", OBJECT, edges, jobs=1)
    assert "[2/2]" in first
    assert all((folder / "build" / edge.output).exists() for edge in edges)
    assert "no work to do" in run_ninja(folder / "build", OBJECT, edges, jobs=1)


def test_ninja_recompiles_what_includes_a_changed_header(project):
    folder, edges = project
    run_ninja(folder / "build", OBJECT, edges, jobs=1)
    (folder / "x.h").write_text("inline int x() { return 3; }\n")
    again = run_ninja(folder / "build", OBJECT, edges, jobs=1)
    assert "[1/1] object 'with it.o'" in again


def test_ninja_recompiles_what_has_other_flags(project):
    folder, edges = project
    run_ninja(folder / "build", OBJECT, edges, jobs=1)
    other = Edge(edges[1].output, "object", edges[1].inputs, {"flags": "-O1"})
    again = run_ninja(folder / "build", OBJECT, [edges[0], other], jobs=1)
    assert "[1/1] object 'without it.o'" in again


def test_ninja_raises_what_the_compiler_said(project):
    folder, edges = project
    (folder / "without.cpp").write_text("int without() { return missing; }\n")
    with pytest.raises(BuildError, match="missing"):
        run_ninja(folder / "build", OBJECT, edges, jobs=1)
    assert not (folder / "build" / edges[1].output).exists()


def test_manifest_keeps_values_as_they_stand():
    edge = Edge("a:b c$d", "object", ("/x y",), {"flags": "-D'A=$B: c'"})
    text = manifest(OBJECT, [edge])
    assert "build a$:b$ c$$d: object /x$ y\n" in text
    assert "  flags = -D'A=$$B: c'\n" in text
