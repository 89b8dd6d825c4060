"""Every contender of every workload under pytest-benchmark, in this process and environment.

pytest benchmarks --benchmark-enable -k "peers and sin1"

Contenders that are not installed are skipped with a reason. `python -m benchmarks run` runs them in
the peers' own environment, each in a process, in turns; its ratios are the ones to quote.
"""

from __future__ import annotations

import functools

import pytest
import torch

from benchmarks.common.agreement import TOLERANCE
from benchmarks.common.workloads import WORKLOADS, Arrays, draw
from benchmarks.peers.contenders import CONTENDERS, REFERENCES, prepared
from benchmarks.peers.driver import disagreement
from benchmarks.peers.step import Missing, Problem

CASES = [
    pytest.param(workload, contender, id=f"{workload.name}-{contender.name}")
    for workload in WORKLOADS.values()
    for contender in CONTENDERS
    if workload.default and contender.kind == workload.kind
]


@functools.lru_cache(maxsize=1)
def numbers_and_result(name: str) -> tuple[Arrays, Arrays]:
    """A workload's numbers, and the reference's result of them."""
    workload = WORKLOADS[name]
    arrays = draw(workload)
    step = prepared(REFERENCES[workload.kind], Problem(workload, arrays, dtype="float64"))
    return arrays, step.read(step.run())


@pytest.mark.parametrize("workload, contender", CASES)
def test_step(benchmark, workload, contender):
    arrays, expected = numbers_and_result(workload.name)
    try:
        step = prepared(contender, Problem(workload, arrays))
    except (Missing, ImportError) as error:
        pytest.skip(str(error))
    assert disagreement(step.read(step.run()), expected) <= TOLERANCE[torch.float32]
    benchmark(step.run)
