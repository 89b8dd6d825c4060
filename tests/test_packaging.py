"""The build's plan and its one-line errors, and the package without a compiled extension."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, **environment}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


def test_one_recursive_glob_feeds_both_builds():
    plan = run(sys.executable, "setup.py", "plan", FASTMETA_CUDA="0")
    assert plan.returncode == 0, plan.stderr
    listed = {line[7:] for line in plan.stdout.splitlines() if line.startswith("source ")}
    present = {p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*.cpp")}
    assert listed == {p for p in present if not p.endswith("_cuda.cpp")}
    assert "setup.py plan" in (ROOT / "CMakeLists.txt").read_text()


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


def test_without_the_extension_everything_works_and_says_so(tmp_path):
    shutil.copytree(
        ROOT / "fastmeta",
        tmp_path / "fastmeta",
        ignore=shutil.ignore_patterns("_C*", "__pycache__"),
    )
    # Without `site` (-S), so that an editable install's import hook does not find the extension.
    path = os.pathsep.join([str(tmp_path), sysconfig.get_path("purelib")])

    def python(*arguments: str) -> subprocess.CompletedProcess:
        return run(
            sys.executable, "-S", *arguments, cwd=tmp_path, PYTHONPATH=path, FASTMETA_BACKEND=""
        )

    script = python("-c", SCRIPT)
    assert script.returncode == 0, script.stderr
    info = python("-m", "fastmeta", "info")
    assert info.returncode == 0 and "without the compiled extension" in info.stdout
