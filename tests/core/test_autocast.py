"""Autocast: a learner's meta-gradient within the bounds that docs/how-to/compile.md states."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta as fm
from fastmeta.engines.functional.layer_routing import RoutedLayers
from tests.helpers.cases import SMALL_CASES
from tests.helpers.networks import Tasks

PAGE = Path(__file__).resolve().parents[2] / "docs/how-to/compile.md"
WAYS, SHOTS, TASKS = 5, 5, 4
SCALE = 1024
DTYPES = (torch.bfloat16, torch.float16)

LEARNERS: dict[str, Callable[[], nn.Module]] = {
    "ProtoNet": lambda: fm.ProtoNet(body(), scale=1 / 32),
    "ANIL": lambda: fm.ANIL(body(), nn.Linear(32, WAYS), lr=0.1, steps=3),
    "MAML": lambda: fm.MAML(whole(), 0.1, steps=2),
    "FOMAML": lambda: fm.FOMAML(whole(), 0.1, steps=2),
    "MetaSGD": lambda: fm.MetaSGD(whole(), lr=0.1),
    "MAMLPlusPlus": lambda: fm.MAMLPlusPlus(
        whole(), steps=2, multi_step_iterations=0, first_order_iterations=0
    ),
    "MetaCurvature": lambda: fm.MetaCurvature(whole(), 0.1, steps=2),
    "IMAML": lambda: fm.IMAML(whole(), 0.1, steps=3, cg_steps=2),
    "Reptile": lambda: fm.Reptile(whole(), lr=0.1, inner_batch=None, rule=fm.rules.SGD()),
}


def layers() -> list[nn.Module]:
    return [nn.Conv2d(1, 32, 3, stride=2), nn.BatchNorm2d(32), nn.ReLU(), nn.AvgPool2d(6)]


def body() -> nn.Module:
    return nn.Sequential(*layers(), nn.Flatten())


def whole() -> nn.Module:
    return nn.Sequential(*layers(), nn.Flatten(), nn.Linear(32, WAYS))


def table() -> dict[tuple[str, torch.dtype], tuple[float, float]]:
    """(learner, dtype) -> largest relative error of the loss and of the gradient, from the page."""
    row = re.compile(r"^\| (\w+) \| (bfloat16|float16) \| ([\d.e-]+) \| ([\d.e-]+) \|", re.M)
    found = row.findall(PAGE.read_text())
    return {(name, getattr(torch, dtype)): (float(a), float(b)) for name, dtype, a, b in found}


def batch(device: str) -> Tasks:
    """Images of classes that differ, with noise."""
    generator = torch.Generator().manual_seed(2)
    means = torch.randn(TASKS, WAYS, 1, 14, 14, generator=generator)
    y = torch.arange(WAYS).repeat_interleave(SHOTS).repeat(TASKS, 1)
    parts: list[Tensor] = []
    for _ in range(2):
        noise = torch.randn(TASKS, WAYS * SHOTS, 1, 14, 14, generator=generator)
        x = means.repeat_interleave(SHOTS, 1) + noise
        parts += [x.to(device), y.to(device)]
    return Tasks(*parts)


def made(name: str, device: str) -> nn.Module:
    torch.manual_seed(0)
    return LEARNERS[name]().to(device)


def meta_gradient(
    call: Callable, learner: nn.Module, device: str, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """The loss and the gradient of all parameters, under autocast unless dtype is None."""
    options = {"num_classes": WAYS} if isinstance(learner, fm.ProtoNet) else {}
    learner.zero_grad()
    with torch.autocast(device, dtype, enabled=dtype is not None):
        loss, outputs = call(*batch(device), **options)
    assert outputs.dtype == loss.dtype == torch.float32
    loss.mul(SCALE).backward()  # or small numbers would be lost in float16
    grads = [p.grad.flatten() for p in learner.parameters() if p.grad is not None]
    return loss.detach(), torch.cat(grads) / SCALE


def errors(found: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """|difference| / |exact|, of the loss and of the gradient as a vector."""
    pairs = zip(found, exact, strict=True)
    return tuple(float((a - b).norm() / b.norm()) for a, b in pairs)


def within(name: str, dtype: torch.dtype, found: tuple[float, float]) -> None:
    """In the bounds of the table, and not the gradient of float32, which would be no autocast."""
    bounds = table()[name, dtype]
    assert all(error < bound for error, bound in zip(found, bounds, strict=True)), found
    assert found[1] > 0


def test_the_table_has_every_learner():
    assert set(table()) == {(name, dtype) for name in LEARNERS for dtype in DTYPES}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LEARNERS)
def test_eager(name, dtype, device):
    learner = made(name, device)
    exact = meta_gradient(learner.meta_loss, learner, device, None)
    found = meta_gradient(learner.meta_loss, learner, device, dtype)
    within(name, dtype, errors(found, exact))


@pytest.mark.rotating
@pytest.mark.parametrize("name", ["ProtoNet", "ANIL", "MAML"])
def test_compiled_without_a_break(name, device):
    """The whole step is compiled, autocast and all, and agrees with float32 without compiling."""
    torch._dynamo.reset()
    learner, dtype = made(name, device), torch.bfloat16
    exact = meta_gradient(learner.meta_loss, learner, device, None)

    def step(*data: Tensor, **options: int) -> tuple[Tensor, Tensor]:
        with torch.autocast(device, dtype):
            return learner.meta_loss(*data, **options)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for call in (compiled, torch.compile(learner.meta_loss, fullgraph=True, backend="aot_eager")):
        found = meta_gradient(call, learner, device, dtype)
        within(name, dtype, errors(found, exact))
    torch._dynamo.reset()


@pytest.mark.parametrize("tasks", [1, 3], ids=["alone", "vmapped"])
@pytest.mark.parametrize(
    ("function", "shapes", "wide"),
    [
        (F.linear, ((4, 6), (5, 6), (5,)), False),
        (F.conv1d, ((2, 3, 8), (4, 3, 3)), False),
        (F.conv2d, ((2, 3, 8, 8), (4, 3, 3, 3), (4,)), False),
        (torch.matmul, ((4, 6), (6, 5)), False),
        (F.group_norm, ((2, 4, 6),), True),
        (F.log_softmax, ((2, 4),), True),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_autocast_computes_in_which_dtype(function, shapes, wide, tasks, device):
    inputs = [torch.randn(tasks, *shape, device=device) for shape in shapes]
    options = {F.group_norm: (2,), F.log_softmax: (1,)}.get(function, ())

    def call(*inputs: Tensor) -> Tensor:
        return function(*inputs, *options)

    if wide:
        inputs = [x.bfloat16() for x in inputs]
    with torch.autocast(device, torch.bfloat16), RoutedLayers(tasks > 1, inputs[0].device):
        each = torch.vmap(call)(*inputs) if tasks > 1 else call(*(x[0] for x in inputs))
    assert each.dtype == (torch.float32 if wide else torch.bfloat16)


OWN_DTYPE = [case for case in SMALL_CASES if case.op != "task_linear"]


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("case", OWN_DTYPE, ids=str)
def test_ops_compute_in_the_dtype_that_they_are_given(case, backend, device):
    args, options = case(torch.float32, device)
    with fm.use_backend(backend):
        exact = case.function(*args, **options)
        with torch.autocast(device, torch.bfloat16):
            assert torch.equal(case.function(*args, **options), exact)


def test_the_loss_of_a_head_is_computed_in_its_dtype(device):
    """Of ops one after another, as where there is no kernel for all of it."""
    learner = fm.ANIL(nn.Identity(), nn.Linear(32, WAYS), lr=0.1, steps=3).to(device)
    features, y = torch.randn(TASKS, 25, 32, device=device), batch(device).support_y
    with fm.use_backend("torch"):
        exact, outputs = learner.meta_loss(features, y, features, y)
        with torch.autocast(device, torch.bfloat16):
            loss, found = learner.meta_loss(features, y, features, y)
    assert torch.equal(loss, exact) and torch.equal(found, outputs)


def test_float64_stays_as_it_is(device):
    x, weight = torch.randn(3, 4, 6, device=device).double(), torch.randn(3, 5, 6, device=device)
    with torch.autocast(device, torch.bfloat16), RoutedLayers(True, x.device):
        assert torch.vmap(F.linear)(x, weight.double()).dtype == torch.float64
