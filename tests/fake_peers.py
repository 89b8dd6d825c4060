"""Contenders for the tests of the benchmark's worker: they build in no time and need no library."""

from __future__ import annotations

import os

import numpy as np

from benchmarks.peers.step import Missing, Problem, Step


def _step(problem: Problem, offset: float) -> Step:
    gradient = problem.arrays["theta"] * 2 + offset
    result = {"loss": np.float64(1.0), "gradient": gradient.astype(problem.dtype)}
    return Step(run=lambda: result, read=lambda found: found, facts={"numpy": np.__version__})


def right(problem: Problem) -> Step:
    return _step(problem, 0.0)


def different(problem: Problem) -> Step:
    return _step(problem, 1.0)


def absent(problem: Problem) -> Step:
    raise Missing("its library is not on this machine")


def unknown_import(problem: Problem) -> Step:
    import a_module_that_is_nowhere  # noqa: F401

    return right(problem)


def broken(problem: Problem) -> Step:
    raise RuntimeError("no such layer\nand a long story")


def dying(problem: Problem) -> Step:
    print("last words")
    os._exit(7)


def hanging(problem: Problem) -> Step:
    import time

    time.sleep(60)
    return right(problem)
