"""Run the tests against another torch than requirements-dev.txt pins.

    python -m tools.other_torch 2.15.0

builds the source distribution and, from it, a wheel in an environment with that torch, both in
build/torch-2.15.0. The tests run there, away from the package's sources. Arguments after the
version go to pytest. Exit status: pytest's.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ("numpy", "setuptools>=70", "wheel", "ninja", "pybind11>=2.13")
# These tests read the sources of the package, not the installed one.
OF_THE_SOURCES = (
    *("tests/packaging/test_packaging.py", "tests/packaging/test_wheel.py"),
    "tests/test_layering.py",
    "tests/test_docs.py::test_excerpts_are_what_the_files_say",
)


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> None:
    subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, check=True)


def install(version: str, folder: Path) -> Path:
    """Install that torch and the wheel; returns the Python of the environment."""
    env, dist = folder / "env", folder / "dist"
    if not (env / "bin" / "python").exists():
        venv.create(env, with_pip=True)
    pip = (env / "bin" / "python", "-m", "pip", "--quiet", "--disable-pip-version-check", "install")
    run(*pip, f"torch=={version}", *BUILD)
    shutil.rmtree(dist, ignore_errors=True)
    run(env / "bin" / "python", "setup.py", "--quiet", "egg_info", "--egg-base", folder,
        "sdist", "--dist-dir", dist)  # fmt: skip
    (archive,) = dist.iterdir()
    ninja = f"{env / 'bin'}{os.pathsep}{os.environ['PATH']}"
    run(*pip, "--no-build-isolation", f"{archive}[test]", PATH=ninja)
    return env / "bin" / "python"


def copy_without_package(folder: Path) -> Path:
    """Copy everything except fastmeta/, which Python would import before the installed package."""
    tree = folder / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if not name.startswith("fastmeta/") and (ROOT / name).exists():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    return tree


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.other_torch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("version", help="as in torch==VERSION")
    options, arguments = parser.parse_known_args()
    folder = ROOT / "build" / f"torch-{options.version}"
    try:
        python = install(options.version, folder)
    except subprocess.CalledProcessError as error:
        print(f"fastmeta: {error}", file=sys.stderr)
        return 1
    others = [f"--deselect={name}" for name in OF_THE_SOURCES]
    tests = [python, "-m", "pytest", *others, *arguments]
    return subprocess.run(tests, cwd=copy_without_package(folder)).returncode


if __name__ == "__main__":
    sys.exit(main())
