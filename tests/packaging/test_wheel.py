"""What the wheel and the source distribution hold; the examples' fastmeta is the wheel's."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = os.environ.get("FASTMETA_EXAMPLES_PYTHON")
from_wheel = pytest.mark.skipif(
    PYTHON is None, reason="needs the wheel in FASTMETA_EXAMPLES_PYTHON: make test-examples"
)


def tracked(folder: str) -> set[str]:
    listed = subprocess.run(
        ["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}


def in_wheel(code: str, folder: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "FASTMETA"))}
    done = subprocess.run(
        [str(PYTHON), "-c", code], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@from_wheel
def test_the_wheel_holds_the_package_and_nothing_else():
    (wheel,) = (ROOT / "dist").glob("fastmeta-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    info = {name for name in names if ".dist-info/" in name}
    extension = {name for name in names - info if name.startswith("fastmeta/_C.")}
    assert len(extension) == 1
    assert names - info - extension == tracked("fastmeta")
    assert "fastmeta/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in info)


@from_wheel
def test_the_examples_python_imports_the_wheel(tmp_path):
    found = Path(in_wheel("import fastmeta; print(fastmeta.__file__)", tmp_path))
    assert found.is_relative_to(Path(str(PYTHON)).parents[1])
    assert in_wheel("import fastmeta; print(fastmeta.build_info()['native'])", tmp_path) == "True"
    finders = in_wheel("import sys; print([f.__name__ for f in sys.meta_path])", tmp_path)
    assert "Editable" not in finders


def test_the_source_distribution_builds_a_wheel_and_holds_no_more(tmp_path):
    made = subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
        + ["sdist", "--dist-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        files = {member.name.partition("/")[2] for member in opened if member.isfile()}
    metadata = {name for name in files if ".egg-info/" in name} | {"PKG-INFO", "setup.cfg"}
    wanted = tracked("fastmeta") | tracked("csrc") | tracked("cmake")
    own = {"setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "README.md", "LICENSE"}
    assert files - metadata == wanted | own
