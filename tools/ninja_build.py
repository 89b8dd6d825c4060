"""Run compilers through ninja, which compiles only changed sources, headers included."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import tempfile
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Edge:
    """A file to make by a rule: `output` is relative to the build folder, `inputs` are absolute.

    The rule's command sees each variable as `$name`, with its value unchanged: the caller quotes
    what a shell would split or expand (`shlex.join`). `$in` and `$out` need no quoting. The
    outputs `after`, of other edges, are made first; the rule's own record says which ones count.
    """

    output: str
    rule: str
    inputs: tuple[str, ...]
    variables: dict[str, str] = field(default_factory=dict)
    after: tuple[str, ...] = ()


class BuildError(RuntimeError):
    """Raised if a source does not compile; the message is the compiler's output."""


def run_ninja(
    folder: Path, rules: dict[str, str], edges: list[Edge], jobs: int | None = None
) -> str:
    """Bring every edge's output up to date in `folder`; returns the output of ninja.

    Args:
        folder: where outputs, the manifest and ninja's own records stand; made if absent. Commands
            run in it.
        rules: shell command of each rule, in ninja's syntax (`$in`, `$out`, an edge's variables,
            `$$` for a dollar). A compiler's `-MD -MF $out.d` makes headers count as inputs.
        edges: what to make. Each one that is made adds a line `[done/all] rule output`.
        jobs: how many commands run at once (default: ninja's choice for this machine).

    Raises:
        BuildError: a command failed, or there is no ninja.

    Example:
        >>> rules = {"object": "g++ -c -MD -MF $out.d -o $out $in"}
        >>> run_ninja(Path("build"), rules, [Edge("a.o", "object", ("/src/a.cpp",))])
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_if_changed(folder / "build.ninja", manifest(rules, edges))
    return bring_up_to_date(folder, [] if jobs is None else ["-j", str(jobs)])


def bring_up_to_date(folder: Path, arguments: list[str]) -> str:
    """Run ninja in a folder that has a manifest, with options or outputs to make; its output.

    Raises BuildError if a command failed, or if there is no ninja.
    """
    result = subprocess.run(
        [find_ninja(), *arguments],
        cwd=folder,
        env={**os.environ, "NINJA_STATUS": "[%f/%t] "},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )
    if result.returncode != 0:
        raise BuildError(result.stdout)
    return result.stdout


def manifest(rules: dict[str, str], edges: list[Edge]) -> str:
    """The text of build.ninja."""
    lines = []
    for name, command in rules.items():
        lines += [f"rule {name}", f"  command = {command}", f"  description = {name} $out"]
        lines += ["  depfile = $out.d", "  deps = gcc"]
    for edge in edges:
        inputs = " ".join(map(escape_path, edge.inputs))
        after = " ".join(["", "||", *map(escape_path, edge.after)] if edge.after else [])
        lines.append(f"build {escape_path(edge.output)}: {edge.rule} {inputs}{after}")
        lines += [f"  {name} = {escape(value)}" for name, value in edge.variables.items()]
    return "\n".join(lines) + "\n"


def escape(text: str) -> str:
    return text.replace("$", "$$")


def escape_path(path: str) -> str:
    return escape(path).replace(" ", "$ ").replace(":", "$:")


def write_if_changed(path: Path, text: str) -> None:
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return
    with tempfile.NamedTemporaryFile("w", dir=path.parent, encoding="utf-8", delete=False) as new:
        new.write(text)
    os.replace(new.name, path)


def find_ninja() -> str:
    """The ninja of the running python's environment, or else the one on PATH."""
    folders = [sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)]
    ninja = shutil.which("ninja", path=os.pathsep.join(folders))
    if ninja is None:
        raise BuildError("ninja is neither in this python's environment nor on PATH")
    return ninja
