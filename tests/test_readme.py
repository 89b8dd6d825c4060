"""What the README and the docstrings show, runs."""

from __future__ import annotations

import doctest
import re
import shlex
from pathlib import Path

import pytest
import torch

import fastmeta as fm
from fastmeta import cli
from fastmeta.config import TrainConfig

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
PUBLIC = [getattr(fm, name) for name in fm.__all__ if callable(getattr(fm, name))]


def test_python_of_the_readme_runs_in_order():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 4
    namespace: dict = {}
    for block in blocks:
        exec(block, namespace)


def commands_of_the_readme() -> list[list[str]]:
    """The arguments of every ``python -m fastmeta``."""
    text = README.replace("\\\n", " ")
    lines = re.findall(r"^python -m fastmeta (.*)$", text, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.parametrize("arguments", commands_of_the_readme(), ids=" ".join)
def test_command_lines_of_the_readme_are_valid(arguments):
    given = vars(cli._parser().parse_args(arguments))
    for name in ("command", "debug"):
        given.pop(name)
    if arguments[0] == "train":
        assert TrainConfig(**given).algorithm == arguments[1]


@pytest.mark.parametrize("thing", PUBLIC, ids=lambda thing: thing.__name__)
def test_examples_of_the_docstrings(thing):
    x, y = torch.zeros(3, 2), torch.zeros(4, 2)
    names = {"torch": torch, "fm": fm, "x": x, "y": y}
    tests = [
        t for t in doctest.DocTestFinder(recurse=True).find(thing, extraglobs=names) if t.examples
    ]
    assert tests, f"{thing.__name__} shows no example"
    if thing in (fm.backend_of, fm.build_info) and not fm.build_info()["native"]:
        pytest.skip("its example shows the native extension")
    for test in tests:
        results = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test)
        assert results.failed == 0
