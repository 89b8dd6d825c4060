"""Contenders for the tests of the benchmark's worker: they build in no time and need no library."""

from __future__ import annotations

import importlib
import os
import time

import numpy as np

from benchmarks.peers.contenders import Contender
from benchmarks.peers.step import Missing, Problem, Step


def contender(name: str, kind: str = "meta") -> Contender:
    """The contender that a function of this module builds."""
    return Contender(name, f"the {name} one", kind, f"tests.benchmarks.fake_peers:{name}")


def _step(problem: Problem, offset: float) -> Step:
    gradient = problem.arrays["theta"] * 2 + offset
    result = {"loss": np.float64(1.0), "gradient": gradient}
    return Step(run=lambda: result, read=lambda found: found, facts={"numpy": np.__version__})


def right(problem: Problem) -> Step:
    print("what a library prints is no reply")
    return _step(problem, 0.0)


def different(problem: Problem) -> Step:
    return _step(problem, 1.0)


def absent(problem: Problem) -> Step:
    raise Missing("its device is not on this machine")


def unimportable(problem: Problem) -> Step:
    importlib.import_module("a_library_that_is_nowhere")
    return right(problem)


def broken(problem: Problem) -> Step:
    raise RuntimeError("no such layer\nand a long story")


def dying(problem: Problem) -> Step:
    print("last words", flush=True)
    os._exit(7)


def hanging(problem: Problem) -> Step:
    time.sleep(60)
    return right(problem)
