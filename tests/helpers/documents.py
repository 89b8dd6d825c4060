"""Parts of documents: code blocks, command lines, tables of recorded results."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from fastmeta import cli
from fastmeta.training.config import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
RECORDS = json.loads((ROOT / "benchmarks/results/records.json").read_text())
_BLOCK = re.compile(r"^( *)```(\w+)([^\n]*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
_TITLE = re.compile(r'title="([\w./]+)"')


class Block(NamedTuple):
    """A fenced block; ``source`` is the file of the repository that it is an excerpt of, if any."""

    language: str
    code: str
    source: Path | None


def blocks(text: str) -> Iterator[Block]:
    for indent, language, options, code in _BLOCK.findall(text):
        title = _TITLE.search(options)
        source = ROOT / title[1] if title else None
        yield Block(language, re.sub(f"^{indent}", "", code, flags=re.MULTILINE), source)


def excerpts(text: str) -> Iterator[tuple[Path, str]]:
    """Return file and text of every excerpt; a line of three dots separates two excerpts."""
    for block in blocks(text):
        if block.source:
            for piece in re.split(r"^ *(?:#|//)? ?\.\.\.\n", block.code, flags=re.MULTILINE):
                yield block.source, piece.strip("\n")


def run_python(text: str, name: str) -> int:
    """Run the Python blocks in order, in one namespace; returns their number."""
    module = ModuleType(re.sub(r"\W", "_", name))  # torch.compile looks globals up in a module
    codes = [b.code for b in blocks(text) if b.language == "python" and b.source is None]
    sys.modules[module.__name__] = module
    try:
        for number, code in enumerate(codes, 1):
            exec(compile(code, f"{name}, block {number}", "exec"), vars(module))
    finally:
        del sys.modules[module.__name__]
    return len(codes)


def commands(text: str) -> list[list[str]]:
    """Return the arguments of every ``python -m fastmeta``."""
    lines = re.findall(r"^\$? ?python -m fastmeta (.*)$", text.replace("\\\n", " "), re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


def check_command(arguments: list[str]) -> None:
    """Raise, or exit, unless the command line and the options of a training are valid."""
    given = vars(cli.build_parser().parse_args(arguments))
    for name in ("command", "debug"):
        given.pop(name)
    if arguments[0] == "train":
        assert TrainConfig(**given).algorithm == arguments[1]


def record_table(name: str) -> str:
    """A record of ``benchmarks/results/records.json`` as Markdown: table and conditions."""
    record = RECORDS[name]
    columns = record["columns"]
    lines = [columns, ["---"] * len(columns), *record["rows"]]
    table = "\n".join("".join(f"| {c} " if c else "| " for c in cells) + "|" for cells in lines)
    return f"{table}\n\n{record['about']}."
