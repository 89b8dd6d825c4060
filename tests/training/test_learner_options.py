"""Defaults by learner and data: what the help says of them is what a run gets."""

from __future__ import annotations

import dataclasses
import re

import pytest

from fastmeta.cli.options import option_help
from fastmeta.training.config import TrainConfig
from fastmeta.training.learner_options import (
    ALGORITHMS,
    LEARNER_OPTIONS,
    METRIC_LEARNERS,
    OF_SOME_LEARNERS,
    describe_default,
)

FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}


def described(name: str, algorithm: str) -> str:
    """The default of a learner on images, from the words of the help."""
    usual, *others = describe_default(name).split("; ")
    for value, learners in re.findall(r"^(\S+) for (.*)$", "\n".join(others), re.MULTILINE):
        if algorithm in learners.split(", "):
            return value
    return usual


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_described_defaults_are_those_of_a_run(algorithm):
    options = dataclasses.asdict(TrainConfig(algorithm, "glyphs", "x"))
    names = [name for name in FIELDS if describe_default(name) and options[name] is not None]
    assert {"ways", "meta_batch", "optimizer"} < set(names)
    for name in names:
        told = described(name, algorithm)
        expected = options[told[2:]] if told.startswith("--") else told
        assert str(options[name]) == str(expected), name


def test_defaults_on_sinusoids_are_described():
    for name in ("ways", "shots", "queries", "meta_batch", "hidden", "inner_lr"):
        value = getattr(TrainConfig("maml", "sinusoid", "x"), name)
        assert describe_default(name).endswith(f"; {value} on sinusoid")


@pytest.mark.parametrize("name", FIELDS)
def test_the_help_names_default_and_learners(name):
    said, default = option_help(FIELDS[name]), FIELDS[name].default
    if default not in (None, dataclasses.MISSING) and default is not False:
        assert said.endswith(f"(default: {default})")
    learners = [of for of in ALGORITHMS if name in LEARNER_OPTIONS[of]]
    groups = [set(METRIC_LEARNERS), set(ALGORITHMS) - set(METRIC_LEARNERS)]
    few = bool(learners) and set(learners) not in groups
    assert said.startswith(", ".join(learners) + ": ") is few
    assert few <= (name in OF_SOME_LEARNERS)
