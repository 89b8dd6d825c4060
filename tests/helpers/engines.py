"""Meta-gradients of the functional and the program engine, for tests that compare them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmeta.core.parameter_layout import ParameterLayout
from fastmeta.engines.auto import AutoEngine
from fastmeta.engines.base import InnerLoopOptions, TaskBatch
from fastmeta.engines.functional.engine import FunctionalEngine
from fastmeta.engines.program.engine import ProgramEngine, ProgramOptions
from tests.helpers.networks import Tasks, relative_error
from tests.helpers.unrolled import MetaGradient, leaves_of

EXACT = 1e-10


def step_sizes(module: nn.Module, *shape: int) -> Tensor:
    """Draw step sizes between 0.02 and 0.1; of shape [P] by default."""
    generator = torch.Generator().manual_seed(3)
    shape = shape or (ParameterLayout.of(module).numel,)
    sizes = 0.02 + 0.08 * torch.rand(shape, generator=generator, dtype=torch.float64)
    return sizes.to(ParameterLayout.of(module).device)


def run(
    module: nn.Module,
    tasks: Tasks,
    lr: Tensor,
    loss=F.cross_entropy,
    step_weights: Sequence[float] | Tensor | None = None,
    **options: object,
) -> MetaGradient:
    """Compute the engine's meta-gradient by ``meta_loss`` and ``backward``."""
    module.zero_grad()
    lr = lr.detach().requires_grad_()
    support_x, query_x = leaves_of(tasks)
    engine = FunctionalEngine(module, loss, InnerLoopOptions(**options))
    value, logits = engine.meta_loss(
        engine.parameters(),
        lr,
        TaskBatch(support_x, tasks.support_y, query_x, tasks.query_y),
        step_weights,
    )
    value.backward()
    grads = {n: p.grad for n, p in module.named_parameters() if p.requires_grad}
    return MetaGradient(value.detach(), logits, grads, lr.grad, support_x.grad, query_x.grad)


def assert_equal(actual: MetaGradient, expected: MetaGradient, tolerance: float = EXACT) -> None:
    assert list(actual.params) == list(expected.params)
    flat = [torch.cat([g.flatten() for g in m.params.values()]) for m in (actual, expected)]
    assert relative_error(*flat) < tolerance
    for name in ("loss", "logits", "lr", "support_x", "query_x"):
        got, value = getattr(actual, name), getattr(expected, name)
        assert (got is None) == (value is None), name
        assert value is None or relative_error(got, value) < tolerance, name


ERRORS = [
    ({"support_x": None}, TypeError, "support_x: expected a tensor, got NoneType"),
    ({"support_x": (3,)}, ValueError, r"support_x: expected shape \[T, examples, ...\]"),
    ({"support_x": (0, 6, 3)}, ValueError, "at least one task and one example"),
    ({"query_x": (3, 0, 3)}, ValueError, "at least one task and one example"),
    ({"query_x": (2, 5, 3)}, ValueError, r"query_x: expected shape \[3, 5, ...\], got \[2, "),
    ({"support_x": (3, 7, 3)}, ValueError, r"support_y: expected shape \[3, 7, ...\], got"),
    ({"query_x": torch.Tensor.float}, TypeError, "query_x: expected dtype torch.float64"),
    ({"query_x": lambda x: x.to("meta")}, ValueError, "query_x: expected device DEVICE, got meta"),
    ({"support_y": lambda y: y * 0 + 4}, ValueError, r"support_y: expected labels in 0..3.*to 4"),
    ({"query_y": lambda y: y * 0 - 2}, ValueError, r"query_y: expected labels in 0..3.* -2 to"),
    ({"support_y": torch.Tensor.int}, TypeError, "support_y: expected int64 class labels"),
]


def engines(net: nn.Module, loss, *options, **more) -> tuple[FunctionalEngine, ProgramEngine]:
    inner = InnerLoopOptions(*options, **more)
    return FunctionalEngine(net, loss, inner), ProgramEngine(net, loss, inner)


def auto_engine(net: nn.Module, loss, options: InnerLoopOptions | None = None) -> AutoEngine:
    """The engine of a learner with ``engine="auto"``."""
    options = InnerLoopOptions() if options is None else options
    program = ProgramEngine(net, loss, options, ProgramOptions(compiled_only=True))
    return AutoEngine(program, FunctionalEngine(net, loss, options))


def leaves(engine: FunctionalEngine, tasks: Tasks, lr) -> tuple[Tensor | float, list, list]:
    """Make tasks and step sizes that require gradients, and list all leaves that do."""
    data = [t.clone().requires_grad_() if i % 2 == 0 else t for i, t in enumerate(tasks)]
    lr = lr.clone().requires_grad_() if isinstance(lr, Tensor) else lr
    leaves = [p for p in engine.module.parameters() if p.requires_grad]
    leaves += [data[0], data[2], *([lr] if isinstance(lr, Tensor) else [])]
    return lr, data, leaves
