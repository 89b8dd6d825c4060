"""The C++ library and the kernels' headers, installed, moved, and used by examples/cpp.

The library is linked from the objects that the Python build made, so that nothing compiles twice.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools.cuda_check import ToolkitMissing, find_toolkit

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples" / "cpp"
NO_GPU = 77
TOOLS = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # ninja's folder too

pytestmark = pytest.mark.skipif(
    "FASTMETA_EXAMPLES_PYTHON" not in os.environ or shutil.which("cmake") is None,
    reason="needs cmake and the objects of the Python build: make test-examples",
)


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    env = {**os.environ, "PATH": TOOLS}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}{done.stderr}"
    return done.stdout


def torch_prefix() -> str:
    import torch

    return torch.utils.cmake_prefix_path


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("build")
    run("cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", "-DFASTMETA_REUSE_OBJECTS=ON",
        f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_BUILD_TYPE=Release")  # fmt: skip
    run("cmake", "--build", folder)
    return folder


@pytest.fixture(scope="module")
def prefix(build: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where fastmeta lies: not where it was installed."""
    folder = tmp_path_factory.mktemp("prefix")
    run("cmake", "--install", build, "--prefix", folder / "installed", "--strip")
    return (folder / "installed").rename(folder / "moved")


def built(example: str, folder: Path, *prefixes: str | Path, nvcc: str = "NOTFOUND") -> Path:
    """Configures and builds a copy of an example; returns the folder of its programs."""
    import torch

    shutil.copytree(EXAMPLES / example, folder / "source")
    path = ";".join(map(str, prefixes))
    # Without optimization kernels compile in a seventh of the time, and here none runs.
    flags = "" if torch.cuda.is_available() else "-G"
    run("cmake", "-S", "source", "-B", "build", "-G", "Ninja", f"-DCMAKE_PREFIX_PATH={path}",
        f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DCMAKE_CUDA_FLAGS={flags}", cwd=folder)  # fmt: skip
    run("cmake", "--build", "build", cwd=folder)
    return folder / "build"


def test_the_python_module_of_cmake_loads(build):
    import torch

    (module,) = (build / "fastmeta").glob("_C.*.so")
    code = f"""
import importlib.util, torch
spec = importlib.util.spec_from_file_location("fastmeta._C", {str(module)!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.build_info()["torch"])
"""
    assert run(sys.executable, "-c", code).strip() == torch.__version__.split("+")[0]


def test_what_is_installed_can_be_moved(build, prefix):
    import torch

    here = [str(ROOT), str(build), str(prefix.parent), str(Path(torch.__file__).parent)]
    texts = [p for p in prefix.rglob("*") if p.suffix in (".cmake", ".h", ".cuh", ".cu")]
    assert len(texts) > 80
    for text in texts:
        assert not [path for path in here if path in text.read_text(encoding="utf-8")], text
    dynamic = run("readelf", "-d", prefix / "lib" / "libfastmeta.so")
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic


def test_the_library_needs_no_python(prefix):
    needed = [line for line in run("readelf", "-d", prefix / "lib" / "libfastmeta.so").splitlines()
              if "NEEDED" in line]  # fmt: skip
    assert any("libtorch_cpu" in line for line in needed)
    assert not [line for line in needed if "python" in line]


def test_tasks_are_adapted_from_cpp(prefix, tmp_path):
    out = run(built("libtorch", tmp_path, prefix, torch_prefix()) / "adapt_tasks", cwd=tmp_path)
    assert "accuracy before adaptation" in out and "agrees with plain ATen" in out


def test_kernels_need_no_torch(prefix, tmp_path):
    out = run(built("raw_pointers", tmp_path, prefix) / "nearest_prototype")
    assert "relative error of the gradient" in out


@pytest.mark.timeout(1200)
def test_cuda_kernels_link_without_torch(prefix, tmp_path):
    try:
        nvcc = find_toolkit().nvcc
    except ToolkitMissing as error:
        pytest.skip(str(error))
    programs = built("raw_pointers", tmp_path, prefix, nvcc=nvcc)
    done = subprocess.run([programs / "nearest_prototype_cuda"], capture_output=True, text=True)
    if done.returncode == NO_GPU:
        assert "there is no GPU" in done.stderr
    else:
        assert done.returncode == 0 and "after 10 steps" in done.stdout, done.stderr


def test_another_torch_is_refused(prefix, tmp_path):
    (tmp_path / "TorchConfig.cmake").write_text("set(TORCH_LIBRARIES)\n")
    (tmp_path / "TorchConfigVersion.cmake").write_text(
        "set(PACKAGE_VERSION 2.99.0)\nset(PACKAGE_VERSION_COMPATIBLE TRUE)\n"
    )
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.24)\nproject(p LANGUAGES CXX)\n"
        "find_package(fastmeta REQUIRED)\n"
    )
    command = ["cmake", "-S", ".", "-B", "build", f"-DCMAKE_PREFIX_PATH={prefix}"]
    done = subprocess.run(
        [*command, f"-DTorch_DIR={tmp_path}"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "and Torch 2.99.0 was found" in " ".join(done.stderr.split())
