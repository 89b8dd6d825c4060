"""Pytest plugin with the fixtures of tests that compare learners."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from fastmeta.learners import MAML
from fastmeta.training import compare as comparing
from fastmeta.training import evaluation, sources
from fastmeta.training import loop as training
from fastmeta.training import plots as curves
from fastmeta.training.compare import report as comparison
from tests.helpers.runs import images


@pytest.fixture
def from_memory(monkeypatch):
    """Take data from memory, whatever data set is named."""
    for module in (sources, evaluation, comparing):
        monkeypatch.setattr(module, "from_spec", lambda *_, **__: images())


@pytest.fixture
def undrawn(monkeypatch):
    """Write empty files for pictures: drawing takes most of the time of a small comparison."""
    monkeypatch.setattr(training, "draw_curves", lambda path, *_: path.touch())
    monkeypatch.setattr(comparison, "draw_comparison", lambda path, *_: path.touch())


@pytest.fixture
def figures(monkeypatch, undrawn) -> list[Figure]:
    """Draw pictures nevertheless, and list them in order."""
    monkeypatch.setattr(comparison, "draw_comparison", curves.draw_comparison)
    saved = []
    savefig = Figure.savefig

    def keep(figure, *args, **kwargs):
        saved.append(figure)
        savefig(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


@pytest.fixture
def at_call(monkeypatch):
    """Run a function at the nth call of the outer loss from now."""
    meta_loss = MAML.meta_loss

    def arrange(number, happen):
        calls = iter(range(1, 10**9))

        def spy(self, *episode):
            if next(calls) == number:
                happen()
            return meta_loss(self, *episode)

        monkeypatch.setattr(MAML, "meta_loss", spy)

    return arrange
