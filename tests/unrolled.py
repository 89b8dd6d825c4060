"""The meta-gradient by unrolling: the ordinary way, and the oracle of the tests."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.backends import cudnn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.networks import Tasks

Loss = Callable[[Tensor, Tensor], Tensor]


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Keeps torch from flash attention and cuDNN's recurrent layers: no second derivatives."""
    with sdpa_kernel(SDPBackend.MATH), cudnn.flags(enabled=False):
        yield


class MetaGradient(NamedTuple):
    loss: Tensor
    logits: Tensor
    params: dict[str, Tensor]
    lr: Tensor | None
    support_x: Tensor | None
    query_x: Tensor | None


def meta_gradient(
    module: nn.Module,
    tasks: Tasks,
    loss: Loss,
    lr: Tensor,
    steps: int,
    first_order: bool = False,
    step_weights: Sequence[float] | None = None,
    training: bool | None = True,
) -> MetaGradient:
    """A loop over tasks and steps with ``create_graph=True``, differentiated as one graph.

    ``lr`` is a scalar, one number a parameter ``[L]``, one an element ``[P]``, one a task and
    element ``[T, P]``, or such a matrix a step ``[K or 1, T or 1, P or L or 1]``. ``step_weights``
    weigh the query losses after each step. The module runs in training mode, so batch norm uses
    batch statistics, or as ``training`` says; None: as it is.
    """
    module = copy.deepcopy(module)
    if training is not None:
        module.train(training)
    params = {n: p for n, p in module.named_parameters() if p.requires_grad}
    lr = lr.detach().requires_grad_()
    support_x, query_x = (x.detach().requires_grad_() for x in (tasks.support_x, tasks.query_x))
    losses, logits = [], []
    with twice_differentiable():
        for t in range(len(support_x)):
            fast = dict(params)
            weighted = []
            for k in range(steps):
                outputs = functional_call(module, fast, (support_x[t],))
                value = loss(outputs, tasks.support_y[t])
                grads = torch.autograd.grad(
                    value, list(fast.values()), create_graph=not first_order, allow_unused=True
                )
                fast = {
                    name: p if g is None else p - step * g
                    for (name, p), g, step in zip(
                        fast.items(), grads, _split(lr, params, t, k), strict=True
                    )
                }
                if step_weights is not None:
                    outputs = functional_call(module, fast, (query_x[t],))
                    weighted.append(step_weights[k] * loss(outputs, tasks.query_y[t]))
            outputs = functional_call(module, fast, (query_x[t],))
            losses.append(sum(weighted) if weighted else loss(outputs, tasks.query_y[t]))
            logits.append(outputs)
        total = torch.stack(losses).mean()
        inputs = [*params.values(), lr, support_x, query_x]
        grads = torch.autograd.grad(total, inputs, allow_unused=True)
    by_name = {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(params.items(), grads, strict=False)
    }
    return MetaGradient(
        total.detach(), torch.stack(logits).detach(), by_name, *grads[len(params) :]
    )


def _split(lr: Tensor, params: dict[str, Tensor], task: int, step: int) -> list[Tensor]:
    if lr.ndim == 3:
        rows = lr[step if len(lr) > 1 else 0]
        return _split(rows[task if len(rows) > 1 else 0], params, task, step)
    if lr.numel() == 1:
        return [lr] * len(params)
    if lr.shape == (len(params),):
        return list(lr)
    row = lr[task] if lr.ndim == 2 else lr
    pieces = row.split([p.numel() for p in params.values()])
    return [piece.view_as(p) for piece, p in zip(pieces, params.values(), strict=True)]


def vmapped_meta_loss(module: nn.Module, tasks: Tasks, loss: Loss, lr: float, steps: int) -> Tensor:
    """All tasks at once, unrolled: the strongest ordinary baseline for memory and speed.

    Each task draws random numbers of its own. The module must keep no running statistics.
    """
    params = dict(module.named_parameters())
    count = len(tasks.support_x)
    fast = {name: p.expand(count, *p.shape) for name, p in params.items()}

    def task_loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss(functional_call(module, params, (x,)), y)

    mapped = vmap(task_loss, randomness="different")
    for _ in range(steps):
        losses = mapped(fast, tasks.support_x, tasks.support_y)
        grads = torch.autograd.grad(losses.sum(), list(fast.values()), create_graph=True)
        fast = {name: p - lr * g for (name, p), g in zip(fast.items(), grads, strict=True)}
    return mapped(fast, tasks.query_x, tasks.query_y).mean()
