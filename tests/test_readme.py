"""What the README and the docstrings show, runs."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest
import torch

import fastmeta as fm
from tests.helpers.documents import check_command, commands, run_python

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
PUBLIC = [getattr(fm, name) for name in fm.__all__ if callable(getattr(fm, name))]


def test_python_of_the_readme_runs_in_order():
    assert run_python(README, "README.md") >= 4


@pytest.mark.parametrize("arguments", commands(README), ids=" ".join)
def test_command_lines_of_the_readme_are_valid(arguments):
    check_command(arguments)


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
