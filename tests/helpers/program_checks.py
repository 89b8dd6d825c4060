"""Checks of compiled task programs against the reference."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import fastmeta as fm
from fastmeta.ops.task_program import COMPILED, NAMES, reference
from fastmeta.ops.task_program.bytecode import Code
from tests.helpers.programs import (
    CLASS_LOSSES,
    LOSSES,
    Raw,
    adapted_half,
    build,
    shape_of,
    tasks_for,
)

# Relative to the largest entry of a result.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


def skip_without_program(device: str) -> None:
    """Skip a test of compiled programs where the extension has none for the device."""
    if (fm.core.backend.PROGRAM, device) not in fm.core.backend.KERNELS:
        pytest.skip(f"the extension has no task program for {device}")


@pytest.fixture(autouse=True)
def kernels(device):
    skip_without_program(device)


def assert_same(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    if expected.numel() == 0:
        return
    actual, expected = actual.double().cpu(), expected.double().cpu()
    torch.testing.assert_close(actual.isnan(), expected.isnan())
    error = (actual - expected).nan_to_num().abs().max().item()
    assert error <= tolerance * max(1e-2, expected.nan_to_num().abs().max().item())


def results(op: str, arguments: tuple, functions=COMPILED) -> tuple[Tensor, ...]:
    result = getattr(functions, op)(*arguments)
    return (result,) if isinstance(result, Tensor) else result


def check(op: str, *args) -> None:
    """Compare the compiled op with the reference on the same numbers in float64."""

    def exact(value):
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.detach().double() if floating else value

    dtype = args[1].dtype
    expected = results(op, tuple(map(exact, args)), reference)
    for a, e in zip(results(op, args), expected, strict=True):
        assert a.dtype == dtype
        assert_same(a, e, TOLERANCE[dtype])


class Setting:
    """A network, its loss, random tasks, and the arguments of every op for them."""

    def __init__(
        self,
        name: str,
        loss: str,
        device: str,
        dtype: torch.dtype = torch.float64,
        steps: int = 2,
        per_task: bool = False,
        half: str | None = None,
        weighs: bool = False,
        **sizes: int,
    ) -> None:
        net = build(name, device, dtype)
        self.raw = Raw.of(net, LOSSES[loss], shape_of(name), adapted_half(net, half))
        self.shared = Code.decode(self.raw.code).shared
        self.data = tasks_for(name, loss, device, dtype, **sizes)
        self.tasks, self.steps = len(self.data.support_x), steps
        self.generator = torch.Generator().manual_seed(5)
        self.lr = self.random(1, 1, 1) * 0.02 + 0.1
        if per_task:
            shift = 0.1 * self.random(self.tasks, self.parameters + self.shared)
            self.raw = self.raw._replace(theta=self.raw.theta + shift)
        sets = self.data.support_x, self.data.query_x
        self.weights = tuple(self.weight(*x.shape[:2]) for x in sets) if weighs else ()

    @property
    def parameters(self) -> int:
        """The number of adapted ones."""
        return self.raw.theta.shape[-1] - self.shared

    def random(self, *shape: int) -> Tensor:
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return x.to(self.raw.theta)

    def weight(self, tasks: int, examples: int) -> Tensor:
        """Draw weights of examples, some 0, some below."""
        weight = self.random(tasks, examples)
        return torch.where(weight.abs() < 0.3, 0.0, weight)

    def mark_absent(self) -> None:
        """Mark examples absent: one of every other task, one task's support, another's queries."""
        for which, y in enumerate((self.data.support_y, self.data.query_y)):
            y[::2, -1] = y[which] = -1

    def arguments(
        self,
        op: str,
        weights: tuple[float, ...] = (),
        first_order: bool = False,
        keep: bool = False,
        inputs: bool = True,
        lr: bool = True,
        gauss_newton: bool = False,
    ) -> tuple:
        x, y, query_x, query_y = self.data
        vector = self.random(self.tasks, self.parameters)
        inner = (self.lr, x, y)
        options, weight = (first_order, keep), self.weights[:1]
        return *self.raw, *{
            "forward": (x,),
            "gradient": (x, y, inputs, *weight),
            "hvp": (x, y, vector, inputs, *weight),
            "products": (x, y, self.random(self.tasks, 3, self.parameters), gauss_newton, *weight),
            "adapt": (*inner, self.steps, self.shared, *weight),
            "adapt_backward": (*inner, self.steps, vector, *options, lr, inputs, *weight),
            "meta_gradient": (
                *(*inner, query_x, query_y, list(weights), self.steps, *options),
                *(True, lr, inputs, inputs, *self.weights),
            ),
        }[op]

    def check(self, op: str, **options) -> None:
        check(op, *self.arguments(op, **options))


STEP_SIZES = {
    "per_step": lambda k, t, p: (k, 1, 1),
    "per_task": lambda k, t, p: (1, t, 1),
    "per_element": lambda k, t, p: (1, 1, p),
    "per_task_and_element": lambda k, t, p: (1, t, p),
    "per_step_and_task": lambda k, t, p: (k, t, 1),
    "per_step_and_element": lambda k, t, p: (k, 1, p),
    "per_step_task_and_element": lambda k, t, p: (k, t, p),
}


def check_random_tasks(
    net: nn.Module,
    choices: random.Random,
    task_counts: Sequence[int],
    supports: Sequence[int],
    queries: Sequence[int],
) -> None:
    """Check every op on random tasks of a network, with random options."""
    loss, half = choices.choice(list(LOSSES)), choices.choice((None, "first", "second"))
    try:
        raw = Raw.of(net, LOSSES[loss], net.shape, adapted_half(net, half))
    except AssertionError:  # this half reaches no output
        raw = Raw.of(net, LOSSES[loss], net.shape)
    shared = Code.decode(raw.code).shared
    adapted = raw.theta.numel() - shared
    tasks, steps = choices.choice(task_counts), choices.choice((1, 2, 3))

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).to(raw.theta)

    def examples(count: int) -> tuple[Tensor, Tensor]:
        y = numbers(tasks, count, 3).sigmoid()
        if loss in CLASS_LOSSES:
            y = y.argmax(2)
            y[:, 0] = 0  # one that no loss ignores
        return numbers(tasks, count, *net.shape), y

    support, query = examples(choices.choice(supports)), examples(choices.choice(queries))
    rows, columns = choices.choice((1, tasks)), choices.choice((1, adapted))
    lr = 0.05 * numbers(choices.choice((1, steps)), rows, columns)
    if choices.random() > 0.5:
        raw = raw._replace(theta=raw.theta + 0.1 * numbers(tasks, raw.theta.numel()))
    vector = numbers(tasks, adapted)
    first_order, keep = choices.random() > 0.7, choices.random() > 0.5
    weights = [choices.choice((0.0, 0.5, -0.3)) for _ in range(choices.choice((0, steps)))]
    requires = [choices.random() > 0.3 for _ in range(3)]
    weighs = choices.random() > 0.7 and not Code.decode(raw.code).has_batch_norm
    of_examples = [numbers(*x.shape[:2]) for x, _ in (support, query)] if weighs else []
    arguments = {
        "forward": (support[0],),
        "gradient": (*support, True, *of_examples[:1]),
        "hvp": (*support, vector, True, *of_examples[:1]),
        "products": (
            *support,
            numbers(tasks, choices.choice((1, 2)), vector.shape[1]),
            choices.random() > 0.5,
            *of_examples[:1],
        ),
        "adapt": (lr, *support, steps, shared, *of_examples[:1]),
        "adapt_backward": (
            *(lr, *support, steps, vector, first_order, keep),
            *(*requires[:2], *of_examples[:1]),
        ),
        "meta_gradient": (
            *(lr, *support, *query, weights, steps, first_order, keep, True),
            *(*requires, *of_examples),
        ),
    }
    for op in NAMES:
        check(op, *raw, *arguments[op])
