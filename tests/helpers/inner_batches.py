"""Supports with another batch at each inner step, and their meta-loss by an unrolled graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from fastmeta.core.parameter_layout import ParameterLayout
from tests.helpers.networks import NETWORKS
from tests.helpers.unrolled import twice_differentiable
from tests.helpers.unrolled_rules import Update

T, S, B, Q = 3, 6, 4, 5
FORMS = ["per_step", "shared", "own"]


class Seen(NamedTuple):
    """The batch of one step of one task."""

    x: Tensor
    y: Tensor
    weight: Tensor | None


@dataclass
class Supports:
    """A support and its batches, in one of the forms.

    Attributes:
        x, y, query_x, query_y: as ``MAML.meta_loss`` takes them.
        inner_batches: ``"per_step"`` or indices.
        weight: of the support, or None.
    """

    x: Tensor
    y: Tensor
    query_x: Tensor
    query_y: Tensor
    inner_batches: Tensor | str
    weight: Tensor | None = None

    @property
    def data(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.x, self.y, self.query_x, self.query_y

    def seen(self, t: int, k: int) -> Seen:
        """The batch of step k of task t."""
        of_task = Seen(self.x[t], self.y[t], None if self.weight is None else self.weight[t])
        if isinstance(self.inner_batches, str):
            rows: Tensor | int = k
        else:
            own = self.inner_batches.ndim == 3
            rows = self.inner_batches[t, k] if own else self.inner_batches[k]
        return Seen(*(None if tensor is None else tensor[rows] for tensor in of_task))


def supports(form: str, steps: int, device: str, name: str = "mlp") -> Supports:
    """Draw a support in a form; batches of indices see examples twice, and leave some out."""
    generator = torch.Generator().manual_seed(11)
    shape = NETWORKS[name][1]

    def examples(*leading: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(T, *leading, *shape, generator=generator, dtype=torch.float64)
        y = torch.randint(0, 4, (T, *leading), generator=generator)
        return x.to(device), y.to(device)

    queries = examples(Q)
    if form == "per_step":
        return Supports(*examples(steps, B), *queries, "per_step")
    rows = (steps, B) if form == "shared" else (T, steps, B)
    indices = torch.randint(0, S, rows, generator=generator)
    indices[..., 1] = indices[..., 0]
    return Supports(*examples(S), *queries, indices.to(device))


def plain(theta: Tensor, g: Tensor, lr: Tensor, state: dict, k: int) -> Tensor:
    """The update of plain descent, as ``tests.helpers.unrolled_rules`` writes rules."""
    return theta - lr * g


def unrolled_loss(
    net: nn.Module,
    theta: Tensor,
    lr: Tensor,
    batch: Supports,
    steps: int,
    update: Update = plain,
    first_order: bool = False,
    step_weights: list[float] | None = None,
) -> tuple[Tensor, Tensor]:
    """The meta-loss and theta_K ``[T, P]``, by a loop over tasks and steps that keeps its graph.

    ``theta`` is ``[P]`` or ``[T, P]``; ``lr`` broadcasts to ``[P]``, or is ``[K, 1 or P]``.
    """
    layout = ParameterLayout.of(net)
    losses, adapted = [], []

    def loss_at(at: Tensor, x: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
        outputs = functional_call(net, layout.views(at), (x,))
        if weight is None:
            return F.cross_entropy(outputs, y)
        return (weight * F.cross_entropy(outputs, y, reduction="none")).sum() / weight.sum()

    with twice_differentiable():
        for t in range(T):
            fast, state, weighted = theta if theta.ndim == 1 else theta[t], {}, []
            for k in range(steps):
                g = torch.autograd.grad(loss_at(fast, *batch.seen(t, k)), fast, create_graph=True)
                g = g[0].detach() if first_order else g[0]
                fast = update(fast, g, lr[k] if lr.ndim == 2 else lr, state, k)
                if step_weights is not None:
                    at_query = loss_at(fast, batch.query_x[t], batch.query_y[t])
                    weighted.append(step_weights[k] * at_query)
            adapted.append(fast)
            last = loss_at(fast, batch.query_x[t], batch.query_y[t])
            losses.append(sum(weighted) if weighted else last)
    return torch.stack(losses).mean(), torch.stack(adapted)


def vmapped_loss(net: nn.Module, theta: Tensor, lr: float, batch: Supports, steps: int) -> Tensor:
    """The same meta-loss with the tasks vmapped, which draw random numbers as the engine does."""
    layout = ParameterLayout.of(net)

    def loss_at(at: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(net, layout.views(at), (x,)), y)

    mapped: Callable[..., Tensor] = vmap(loss_at, randomness="different")
    fast = theta.expand(T, -1)
    for k in range(steps):
        x, y, _ = zip(*(batch.seen(t, k) for t in range(T)), strict=True)
        losses = mapped(fast, torch.stack(x), torch.stack(y))
        fast = fast - lr * torch.autograd.grad(losses.sum(), fast, create_graph=True)[0]
    return mapped(fast, batch.query_x, batch.query_y).mean()
