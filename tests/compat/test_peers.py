"""Scripts of learn2learn and higher give these libraries' numbers after their import is changed."""

from __future__ import annotations

import doctest
import json
import re
from pathlib import Path

import pytest

from fastmeta.compat import higher, learn2learn
from tests.compat.peer_scripts import FOLDER, SCRIPTS, load_peer, run

# What learn2learn 0.2.0 and higher 0.2.1 computed, on one machine.
GOLDEN = json.loads((FOLDER / "golden.json").read_text())
SAME = 1e-9


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_ported_script_gives_the_numbers_of_the_library(script):
    assert run(script, ported=True) == pytest.approx(GOLDEN[script], rel=SAME, abs=SAME)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_ported_script_gives_the_numbers_of_the_library_beside_it(script):
    try:
        load_peer(script)
    except ImportError as error:
        pytest.skip(f"the library is not installed here: {error}")
    expected = run(script, ported=False)
    assert run(script, ported=True) == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert expected == pytest.approx(GOLDEN[script], rel=SAME, abs=SAME)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_differ_in_their_imports_alone(script):
    lines = (FOLDER / f"{script}.py").read_text().splitlines()
    imports = [line for line in lines if re.match(r"(import|from) (learn2learn|higher)\b", line)]
    assert imports, "it imports the library"
    assert not any("fastmeta" in line for line in lines)


def test_python_of_the_page_on_porting_runs():
    page = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "port.md"
    namespace: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(block, namespace)


MODULES = [
    *(learn2learn.utils, learn2learn.algorithms.maml, learn2learn.algorithms.meta_sgd),
    *(higher, higher.patch, higher.optim),
]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_examples_of_the_docstrings(module):
    results = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert results.attempted
    assert results.failed == 0
