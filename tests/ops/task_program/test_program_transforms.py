"""The task program's ops under fake tensors, torch.compile and vmap; MAML under torch.compile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastmeta as fm
from fastmeta.ops.task_program import NAMES
from tests.helpers.program_checks import Setting, kernels, results
from tests.helpers.programs import build, tasks_for

__all__ = ["kernels"]  # a fixture of every test here


@pytest.mark.parametrize("op", NAMES)
def test_opcheck(op, device):
    setting = Setting("tanh", "mse", device, tasks=2)
    overload = getattr(torch.ops.fastmeta, f"task_program_{op}").default
    checks = torch.library.opcheck(overload, setting.arguments(op))
    assert set(checks.values()) == {"SUCCESS"}


@pytest.mark.parametrize("op", NAMES)
def test_vmap_equals_a_loop(op, device):
    setting = Setting("tanh", "mse", device, tasks=2)
    arguments = setting.arguments(op)
    floating = [i for i, a in enumerate(arguments) if isinstance(a, Tensor) and i not in (0, 2)]
    for place in floating:

        def function(value: Tensor, place: int = place) -> tuple[Tensor, ...]:
            return results(op, (*arguments[:place], value, *arguments[place + 1 :]))

        samples = torch.stack([arguments[place], 0.5 * arguments[place]], -1)
        loop = zip(*map(function, samples.unbind(-1)), strict=True)
        for actual, expected in zip(torch.vmap(function, -1)(samples), loop, strict=True):
            assert torch.equal(actual, torch.stack(expected))


@pytest.mark.parametrize("engine", ["program", "functional"])
def test_maml_inside_a_compiled_function(engine, device):
    torch._dynamo.reset()
    maml = fm.MAML(build("tanh", device), 0.1, 2, engine=engine)
    tasks = tasks_for("tanh", device=device)

    def step(*tasks: Tensor) -> Tensor:
        return 2 * maml.meta_loss(*tasks)[0]

    compiled = torch.compile(step, backend="aot_eager")
    for _ in range(2):  # before a program was made, and after
        actual = torch.autograd.grad(compiled(*tasks), maml.module[0].weight)[0]
        expected = torch.autograd.grad(step(*tasks), maml.module[0].weight)[0]
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-14)
    torch._dynamo.reset()
