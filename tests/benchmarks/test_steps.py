"""The contenders that need torch alone give the reference's result; the rest does in a run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.common.networks import MLP, Conv4, LoraMLP
from benchmarks.common.workloads import WORKLOADS, draw
from benchmarks.peers.contenders import CONTENDERS, OURS, REFERENCES, prepared
from benchmarks.peers.driver import disagreement
from benchmarks.peers.step import Problem

NAMES = (
    *(OURS, "fastmeta-autograd", "fastmeta-functional", "torch-func", "adjoint", "autograd"),
    "torch-forward",
)
PLAIN = [c for c in CONTENDERS if c.name in NAMES]
SMALL = {
    "mse": replace(WORKLOADS["sin1"], tasks=2, steps=2),
    "one task": replace(WORKLOADS["sin1_t1"], steps=3),
    "images": replace(WORKLOADS["omni_conv1"], tasks=2, network=Conv4(2, 5, 1, 16), queries=10),
    "hvp": replace(WORKLOADS["hvp_mlp_t32"], tasks=2, network=MLP((5, 4, 3)), support=6),
    "iteration": replace(WORKLOADS["sin1_iteration"], tasks=2, steps=2),
    "context": replace(WORKLOADS["cavia1"], tasks=2, steps=2),
    "lora": replace(WORKLOADS["lora"], network=LoraMLP((4, 6, 3), 2), tasks=2, steps=2),
    "hvp of one task": replace(WORKLOADS["hvp_mlp_t1"], network=MLP((5, 4, 3)), support=6),
}
# torch.func differentiates a batch norm wrongly where vmap of a gradient is differentiated again.
WRONG = ("images", "torch-func")
CASES = [
    pytest.param(SMALL[name], contender, id=f"{name}-{contender.name}")
    for name in SMALL
    for contender in PLAIN
    if contender.kind == SMALL[name].kind and (name, contender.name) != WRONG
]


@pytest.mark.parametrize("workload, contender", CASES)
def test_agrees_with_the_reference_in_float64(workload, contender):
    problem = Problem(workload, draw(workload), dtype="float64")
    steps = [prepared(one, problem) for one in (contender, REFERENCES[workload.kind])]
    found, expected = (step.read(step.run()) for step in steps)
    assert disagreement(found, expected) < 1e-11
