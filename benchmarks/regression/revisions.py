"""Both revisions on disk: the base's sources in a worktree, and each with its own extension."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

FOLDER = Path("build") / "regression"  # ignored by git; one folder a base, kept with its objects
COMPILED = ("csrc", "setup.py")  # the sources of the extension


class Refused(Exception):
    """Revisions that cannot be compared; the message is `name: expected X, got Y`."""


def _git(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            ("git", *arguments), cwd=root, check=False, capture_output=True, text=True
        )
    except FileNotFoundError:
        raise Refused("git: expected on PATH, got nothing") from None


def commit_of(revision: str, root: Path) -> str:
    """The full name of the commit."""
    # Without the options' end a name that begins with "-" would be an option.
    arguments = ("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    result = _git(root, *arguments)
    if result.returncode:
        raise Refused(f"base: expected a revision of the repository {root}, got {revision!r}")
    return result.stdout.strip()


def checkout(commit: str, root: Path) -> Path:
    """The folder with the sources of a commit, made if need be."""
    folder = root / FOLDER / commit[:12]
    if not folder.exists():
        # Forced: git may still list a worktree whose folder was deleted.
        made = _git(root, "worktree", "add", "--force", "--detach", str(folder), commit)
        if made.returncode:
            raise Refused(f"base: expected a worktree in {folder}, got {made.stderr.strip()}")
    _check_clean(folder, commit)
    return folder


def _check_clean(folder: Path, commit: str) -> None:
    """Raise unless the sources are the commit's."""
    head = _git(folder, "rev-parse", "HEAD").stdout.strip()
    if head != commit:
        raise Refused(f"base: expected commit {commit} in {folder}, got {head}; delete the folder")
    changed = _git(folder, "status", "--porcelain").stdout.split("\n")[:-1]
    if changed:
        names = ", ".join(line[3:] for line in changed)
        raise Refused(f"base: expected no changes in {folder}, got {names}; delete the folder")


def has_same_kernels(commit: str, root: Path) -> bool:
    """Whether the working tree compiles the sources of the commit."""
    changed = _git(root, "diff", "--quiet", commit, "--", *COMPILED).returncode
    added = _git(root, "ls-files", "--others", "--exclude-standard", "--", *COMPILED).stdout
    return not changed and not added


def extension_of(folder: Path) -> Path:
    extensions = sorted((folder / "fastmeta").glob("_C*.so"))
    if len(extensions) != 1:
        names = [path.name for path in extensions]
        raise Refused(f"extension: expected one fastmeta/_C*.so in {folder}, got {names}")
    return extensions[0]


def check_compiler(environment: Mapping[str, str]) -> None:
    compiler = environment.get("CXX", "g++").split()[0]
    for program in (compiler, "ninja"):
        if not shutil.which(program, path=environment.get("PATH", "")):
            raise Refused(f"compiler: expected {program} on PATH, got nothing")


def build(folder: Path) -> None:
    """Compile the extension in place by this interpreter; objects that are up to date stay."""
    # ninja comes from the interpreter's environment, so its folder leads PATH.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    environment = {**os.environ, "PATH": path}
    check_compiler(environment)
    # Forced: setuptools by itself overlooks a changed header. ninja still skips what is current.
    command = (sys.executable, "setup.py", "--quiet", "build_ext", "--inplace", "--force")
    done = subprocess.run(
        command, cwd=folder, env=environment, check=False, capture_output=True, text=True
    )
    if done.returncode:
        sys.stderr.write(done.stdout + done.stderr)
        raise Refused(f"build: expected {folder} to compile, got exit code {done.returncode}")
    extension_of(folder)


def prepare(revision: str, root: Path) -> Path:
    """Compile both revisions; returns the folder of the base."""
    commit = commit_of(revision, root)
    base = checkout(commit, root)
    print(f"compiles {root}", flush=True)
    build(root)
    if has_same_kernels(commit, root):
        compiled = extension_of(root)
        shutil.copyfile(compiled, base / "fastmeta" / compiled.name)
    else:
        print(f"compiles {base}", flush=True)
        build(base)
    return base
