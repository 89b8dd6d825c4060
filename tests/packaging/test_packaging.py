"""The build's plan and its one-line errors, and the package without a compiled extension."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, **environment}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


def test_one_recursive_glob_feeds_both_builds():
    plan = run(sys.executable, "setup.py", "plan", FASTMETA_CUDA="0")
    assert plan.returncode == 0, plan.stderr
    lines = [line.split(" ", 1) for line in plan.stdout.splitlines()]
    listed = {name for kind, name in lines if kind in ("source", "python_source")}
    present = {p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*.cpp")}
    assert listed == {p for p in present if not p.endswith("_cuda.cpp")}
    assert "setup.py plan" in (ROOT / "CMakeLists.txt").read_text()
    library = {name for kind, name in lines if kind == "source"}
    assert not [name for name in library if "pybind11" in (ROOT / name).read_text()]


@pytest.mark.rotating
def test_the_kernels_headers_compile_without_torch(tmp_path):
    """Each by itself, and all of them in one program."""
    plan = run(sys.executable, "setup.py", "plan", FASTMETA_CUDA="0")
    kernels = [line[7:] for line in plan.stdout.splitlines() if line.startswith("kernel ")]
    assert {"prototypes/prototypes.h", "prototypes/prototypes.cu"} <= set(kernels)
    assert "common/cpu/gemm.h" not in kernels and "prototypes/arguments.h" not in kernels
    headers = [name for name in kernels if name.endswith(".h")]
    program = tmp_path / "all.h"
    program.write_text("".join(f'#include "{name}"\n' for name in headers))
    sources = [*(f"csrc/{name}" for name in headers), str(program)]
    command = ("g++", "-std=c++20", "-fsyntax-only", "-I", "csrc", "-x", "c++", *sources)
    compiled = run(*command, CPATH="", CPLUS_INCLUDE_PATH="")
    assert compiled.returncode == 0, compiled.stderr


@pytest.mark.rotating
@pytest.mark.parametrize(
    "environment, message",
    [
        ({"CXX": "no-such-compiler"}, "no C++ compiler: no-such-compiler is not on PATH"),
        ({"FASTMETA_ISA": "sse9"}, "FASTMETA_ISA must be one of avx512, avx2, portable"),
        ({"FASTMETA_CUDA": "yes"}, "FASTMETA_CUDA must be 0 or 1, got 'yes'"),
    ],
)
def test_a_failed_build_says_in_one_line_what_is_missing(environment, message, tmp_path):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = (sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path))
    build = run(*command, PATH=path, **environment)
    assert build.returncode != 0
    assert build.stderr.strip().splitlines()[-1].startswith(f"fastmeta: {message}")
    assert "Traceback" not in build.stderr


@pytest.mark.rotating
def test_cuda_is_refused_in_one_line_where_torch_has_none():
    import torch

    if torch.version.cuda:
        pytest.skip("this torch has CUDA")
    plan = run(sys.executable, "setup.py", "plan", FASTMETA_CUDA="1")
    assert plan.returncode != 0 and len(plan.stderr.strip().splitlines()) == 1
    assert "was built without CUDA" in plan.stderr


SCRIPT = """
import warnings
import torch
import fastmeta as fm

assert fm.build_info()["native"] is False, fm.build_info()
assert "without the compiled" in fm.build_info()["reason"]
assert fm.backend_of("prototype_loss") == "torch"
x = torch.randn(2, 4, 3, requires_grad=True)
y = torch.randn(2, 5, 3)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    fm.prototype_loss(x, torch.zeros(2, 4, dtype=torch.int64), y).backward()
    fm.prototype_loss(x, torch.zeros(2, 4, dtype=torch.int64), y).backward()
messages = [str(w.message) for w in caught if w.category is RuntimeWarning]
assert len(messages) == 1 and "plain PyTorch" in messages[0], messages
model = torch.nn.Linear(3, 5)
loss, logits = fm.MAML(model, lr=0.1).meta_loss(x.detach(), torch.zeros(2, 4, dtype=torch.int64),
                                                x.detach(), torch.zeros(2, 4, dtype=torch.int64))
loss.backward()
assert model.weight.grad.abs().sum() > 0
"""


def in_copy(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Runs Python where `folder` holds a copy of the package without its extension."""
    ignored = shutil.ignore_patterns("_C*", "__pycache__")
    shutil.copytree(ROOT / "fastmeta", folder / "fastmeta", ignore=ignored, dirs_exist_ok=True)
    # Without `site` (-S), so that an editable install's import hook does not find the extension.
    path = os.pathsep.join([str(folder), sysconfig.get_path("purelib")])
    environment = {"PYTHONPATH": path, "FASTMETA_BACKEND": ""}
    return run(sys.executable, "-S", *arguments, cwd=folder, **environment)


@pytest.mark.rotating
def test_without_the_extension_everything_works_and_says_so(tmp_path):
    script = in_copy(tmp_path, "-c", SCRIPT)
    assert script.returncode == 0, script.stderr
    info = in_copy(tmp_path, "-m", "fastmeta", "info")
    assert info.returncode == 0 and "without the compiled extension" in info.stdout


@pytest.mark.rotating
def test_sources_that_hide_the_installed_package_say_so(tmp_path):
    (tmp_path / "setup.py").touch()
    info = in_copy(tmp_path, "-m", "fastmeta", "info")
    assert info.returncode == 0, info.stderr
    assert f"imported from its sources in {tmp_path}" in info.stdout
    assert "another folder" in info.stdout


@pytest.mark.rotating
@pytest.mark.parametrize(
    "content, reason",
    [
        (b"\0fastmeta compiled with torch 1.13.2\0", "it was compiled with torch 1.13.2"),
        (b"no library", "file too short"),
    ],
)
def test_an_extension_that_does_not_fit_is_left_alone(content, reason, tmp_path):
    (tmp_path / "fastmeta").mkdir()
    (tmp_path / "fastmeta" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(content)
    code = "import fastmeta as fm; print(fm.backend_of('prototypes'), fm.build_info()['reason'])"
    script = in_copy(tmp_path, "-W", "ignore", "-c", code)
    assert script.returncode == 0, script.stderr
    assert script.stdout.startswith("torch ") and reason in script.stdout
