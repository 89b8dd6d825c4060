"""The README: short, its code and its links work. The examples of the docstrings run."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest
import torch

import fastmeta as fm
from tests.helpers.documents import check_command, commands, run_python

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PUBLIC = [getattr(fm, name) for name in fm.__all__ if callable(getattr(fm, name))]


def test_the_readme_is_one_page():
    assert len(README.splitlines()) <= 150
    assert len(README.split()) <= 1300


def test_the_first_screen_shows_how_to_start():
    first, code = README.split("```python\n")[:2]
    assert "![" in first and "pip install" in first and "<!-- numbers -->" in first
    assert len(first.splitlines()) <= 25 and len(code.split("```")[0].splitlines()) == 12


def test_the_readme_names_every_op_and_learner():
    classes = {name for name in fm.__all__ if name[0].isupper()}
    ops = {"hvp", *fm.ops.__all__} - {"backend_of", "build_info", "use_backend"}
    assert {name for name in classes | ops if f"[`{name}`](" not in README} == set()


def test_python_of_the_readme_runs_in_order():
    assert run_python(README, "README.md") == 2


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
