"""A differentiable gradient step on the parameters of one task's learner."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn

from fastmeta.core.dtypes import HALF
from fastmeta.learners.gradient._module_copy import replace_tensors


def task_gradients(
    module: nn.Module,
    loss: Tensor,
    first_order: bool,
    allow_unused: bool | None,
    allow_nograd: bool | None,
    names: Collection[str] | None = None,
) -> dict[Tensor, Tensor | None]:
    """The gradient to each adapted parameter, in the module's order; None if it is unused.

    In second order the gradients have a graph; in first order they have none, and the graph of the
    loss is freed.

    Args:
        allow_unused: whether the loss may be independent of parameters. None: it may not, and the
            error names no option.
        allow_nograd: whether parameters may be frozen. None: as for ``allow_unused``.
        names: the adapted parameters; None: all trainable ones.

    Raises:
        ValueError: a loss without a graph, or unused or frozen parameters that are not allowed.
    """
    if not loss.requires_grad:
        raise ValueError(
            "loss: expected one that depends on the learner's parameters, with gradients enabled "
            "from its clone() on; got a tensor that does not require grad"
        )
    named = dict(module.named_parameters())
    if not allow_nograd:
        frozen = [name for name, p in named.items() if not p.requires_grad]
        _check_none(frozen, "do not require gradients", allow_nograd, "allow_nograd")
    params = {
        name: p for name, p in named.items() if p.requires_grad and (names is None or name in names)
    }
    grads = torch.autograd.grad(
        loss,
        list(params.values()),
        retain_graph=not first_order,
        create_graph=not first_order,
        allow_unused=True,
    )
    if not allow_unused:
        unused = [name for name, g in zip(params, grads, strict=True) if g is None]
        _check_none(unused, "are not used by the loss", allow_unused, "allow_unused")
    return dict(zip(params.values(), grads, strict=True))


def descend(
    module: nn.Module,
    grads: Iterable[tuple[Tensor, Tensor | None]],
    step_sizes: Iterable[float | Tensor],
) -> None:
    """Replace each parameter p that has a gradient by ``p - lr grad``.

    Args:
        module: the module with the parameters.
        grads: pairs of a parameter and its gradient.
        step_sizes: lr of each parameter: a number, or a tensor that broadcasts to it.
    """
    pairs = zip(grads, step_sizes, strict=True)
    new = {p: _descended(p, grad, lr) for (p, grad), lr in pairs if grad is not None}
    replace_tensors(module, new)


def _descended(parameter: Tensor, grad: Tensor, lr: float | Tensor) -> Tensor:
    # inner_update pays only with many tasks: for one task and the six parameters of a small MLP it
    # takes ten times as long on one core as these ops.
    if not isinstance(lr, Tensor):
        if parameter.dtype in HALF:  # torch.add would round the step size to their dtype
            return (parameter.float() - lr * grad.float()).to(parameter.dtype)
        return torch.add(parameter, grad, alpha=-lr)
    # A step size of higher precision is used in full; the result keeps the parameter's dtype.
    return torch.addcmul(parameter, lr.to(parameter.device), grad, value=-1).to(parameter.dtype)


def _check_none(names: list[str], what: str, allowed: bool | None, option: str) -> None:
    if names:
        hint = "" if allowed is None else f"; {option}=True leaves them unchanged"
        raise ValueError(f"adapt: the parameters {names} {what}{hint}")
