"""The meta-gradient by an unrolled graph: the reference of the tests."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.backends import cudnn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastmeta as fm
from tests.helpers.networks import Tasks

Loss = Callable[[Tensor, Tensor], Tensor]


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Disable flash attention and cuDNN's recurrent layers, which have no second derivative."""
    with sdpa_kernel(SDPBackend.MATH), cudnn.flags(enabled=False):
        yield


class MetaGradient(NamedTuple):
    loss: Tensor
    logits: Tensor
    params: dict[str, Tensor]
    lr: Tensor | None
    support_x: Tensor | None
    query_x: Tensor | None
    others: tuple[Tensor | None, ...] = ()


def meta_gradient(
    module: nn.Module,
    tasks: Tasks,
    loss: Loss,
    lr: Tensor,
    steps: int,
    first_order: bool = False,
    step_weights: Sequence[float] | None = None,
    training: bool | None = True,
    at_step: Callable[[nn.Module, int], object] = lambda module, k: None,
    adapt: Collection[str] | None = None,
    inner_loss: Loss | None = None,
    start: Tensor | None = None,
    weights: Sequence[Tensor] = (),
    outer: Sequence[Tensor] = (),
) -> MetaGradient:
    """Loop over tasks and steps with ``create_graph=True``, and differentiate the graph.

    ``lr`` is a scalar, one number a parameter ``[L]``, one an element ``[P]``, one a task and
    element ``[T, P]``, or such a matrix a step ``[K or 1, T or 1, P or L or 1]``. ``step_weights``
    weigh the query losses after each step. The module runs in training mode, so batch norm uses
    batch statistics; ``training`` sets another mode, and None keeps the module's. ``at_step(module,
    k)`` is called before each pass at theta_k. ``adapt``: names of the parameters that the steps
    change; None: all. ``inner_loss``: of the steps; None: ``loss``. ``start`` ``[T, P]``: of each
    task's steps. ``weights``: of the examples, ``[T, S]`` and ``[T, Q]``. ``others`` of the result
    are the gradients to ``start``, the weights, and ``outer``, which the losses read.
    """
    module = copy.deepcopy(module)
    if training is not None:
        module.train(training)
    params = {n: p for n, p in module.named_parameters() if p.requires_grad}
    adapted = {name: p for name, p in params.items() if adapt is None or name in adapt}
    lr = lr.detach().requires_grad_()
    support_x, query_x = leaves_of(tasks)
    support_weight, query_weight = weights or (None, None)
    losses, logits = [], []
    with twice_differentiable():
        for t in range(len(support_x)):
            fast = dict(params)
            if start is not None:
                fast |= zip(adapted, _split(start[t], adapted, t, 0), strict=True)
            weighted = []
            at_step(module, 0)
            for k in range(steps):
                outputs = functional_call(module, fast, (support_x[t],))
                value = _mean(inner_loss or loss, outputs, tasks.support_y[t], support_weight, t)
                fast |= _stepped(fast, value, adapted, _split(lr, adapted, t, k), first_order)
                at_step(module, k + 1)
                if step_weights is not None:
                    outputs = functional_call(module, fast, (query_x[t],))
                    value = _mean(loss, outputs, tasks.query_y[t], query_weight, t)
                    weighted.append(step_weights[k] * value)
            outputs = functional_call(module, fast, (query_x[t],))
            value = _mean(loss, outputs, tasks.query_y[t], query_weight, t)
            losses.append(sum(weighted) if weighted else value)
            logits.append(outputs)
        others = [*([] if start is None else [start]), *weights, *outer]
        return _differentiated(losses, logits, params, lr, [support_x, query_x], others)


def _stepped(
    params: dict[str, Tensor],
    loss: Tensor,
    adapted: Collection[str],
    rates: list[Tensor],
    first_order: bool,
) -> dict[str, Tensor]:
    """The adapted parameters after a step of plain descent."""
    before = [params[name] for name in adapted]
    grads = torch.autograd.grad(loss, before, create_graph=not first_order, allow_unused=True)
    steps = zip(adapted, before, grads, rates, strict=True)
    return {name: p if g is None else p - rate * g for name, p, g, rate in steps}


def _differentiated(
    losses: list[Tensor],
    logits: list[Tensor],
    params: dict[str, Tensor],
    lr: Tensor,
    inputs: list[Tensor],
    others: list[Tensor],
) -> MetaGradient:
    """The mean of the losses with its gradients; inputs that are integers have none."""
    total = torch.stack(losses).mean()
    data = [x for x in inputs if x.requires_grad]
    sources = [*params.values(), lr, *data, *others]
    grads = list(torch.autograd.grad(total, sources, allow_unused=True))
    to_params = [grads.pop(0) for _ in params]
    to_lr, to_data = grads.pop(0), [grads.pop(0) for _ in data]
    by_name = {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(params.items(), to_params, strict=True)
    }
    to_data += [None] * (len(inputs) - len(data))
    outputs = torch.stack(logits).detach()
    return MetaGradient(total.detach(), outputs, by_name, to_lr, *to_data, tuple(grads))


def _mean(loss: Loss, outputs: Tensor, y: Tensor, weight: Tensor | None, task: int) -> Tensor:
    """The loss of one task, or the mean of its examples' losses with weights."""
    if weight is None:
        return loss(outputs, y)
    pairs = zip(outputs.split(1), y.split(1), strict=True)
    return (weight[task] * torch.stack([loss(*pair) for pair in pairs])).sum() / weight[task].sum()


def leaves_of(tasks: Tasks) -> list[Tensor]:
    """Support and query inputs as leaves, which require a gradient unless they are integers."""
    inputs = (tasks.support_x, tasks.query_x)
    return [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]


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


class _RowNorm(nn.Module):
    """A batch norm with rows of weight and bias, written by hand."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.bias, self.eps, self.row = norm.weight, norm.bias, norm.eps, 0

    def forward(self, x: Tensor) -> Tensor:
        dims = [d for d in range(x.ndim) if d != 1]
        centred = x - x.mean(dims, keepdim=True)
        normalised = centred / (centred.square().mean(dims, keepdim=True) + self.eps).sqrt()
        row, shape = min(self.row, len(self.weight) - 1), (-1, *[1] * (x.ndim - 2))
        return normalised * self.weight[row].view(shape) + self.bias[row].view(shape)


def with_rows_by_hand(net: nn.Sequential) -> nn.Sequential:
    """Replace the network's per-step norms by ``_RowNorm``; the parameters are the same."""
    kinds = fm.models.PerStepBatchNorm1d, fm.models.PerStepBatchNorm2d
    norms = {m: _RowNorm(m) for m in net if isinstance(m, kinds)}
    return nn.Sequential(*(norms.get(m, m) for m in net))


def set_row(net: nn.Module, k: int) -> None:
    """Select the row of step k: ``at_step`` for such a network."""
    for module in net.modules():
        if isinstance(module, _RowNorm):
            module.row = k


def vmapped_meta_loss(module: nn.Module, tasks: Tasks, loss: Loss, lr: float, steps: int) -> Tensor:
    """Unroll all tasks at once under vmap: the strongest baseline for memory and speed.

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
