"""The ops of a task program: forward, gradient, Hessian-vector product, inner loop, meta-gradient.

Raw ops: tensors are [T, B, ...], parameters theta [P] or [T, P], frozen parameters [F], step sizes
[K or 1, T or 1, P or 1]; ``bytecode`` documents the code. ``fastmeta.engines.program`` joins them
to autograd. They work on fake tensors, so under torch.compile, and under vmap, in a loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fastmeta.core import backend
from fastmeta.ops._registration import contiguous_like, register
from fastmeta.ops.task_program import reference as _program_reference

NAMES = ("forward", "gradient", "hvp", "adapt", "adapt_backward", "meta_gradient")


def implementation(like: Any) -> SimpleNamespace | ModuleType:
    """The functions of ``NAMES``, compiled or in plain PyTorch, for a dtype and device.

    ``like`` is a tensor or layout that has them. Warns once where compiled ones were expected.
    """
    return COMPILED if backend.is_native(backend.PROGRAM, like) else _program_reference


def _outputs(x: Tensor) -> Tensor:
    """Outputs [T, B, n]; the code knows n, and a fake tensor does not know its values."""
    return x.new_empty(*x.shape[:2], torch.library.get_ctx().new_dynamic_size())


def _rows(theta: Tensor, x: Tensor) -> Tensor:
    return theta.new_empty(x.shape[0], theta.shape[-1])


def _if_wanted(like: Tensor, wanted: bool) -> Tensor:
    return contiguous_like(like) if wanted else like.new_empty(0)


def _forward(code: Tensor, theta: Tensor, frozen: Tensor, x: Tensor) -> Tensor:
    return _outputs(x)


def _gradient(
    code: Tensor, theta: Tensor, frozen: Tensor, x: Tensor, y: Tensor, input_grad: bool
) -> tuple[Tensor, ...]:
    outputs, loss = _outputs(x), x.new_empty(x.shape[0])
    return loss, outputs, _rows(theta, x), _if_wanted(x, input_grad)


def _hvp(
    code: Tensor,
    theta: Tensor,
    frozen: Tensor,
    x: Tensor,
    y: Tensor,
    vector: Tensor,
    input_grad: bool,
) -> tuple[Tensor, ...]:
    return _rows(theta, x), _if_wanted(x, input_grad)


def _adapt(
    code: Tensor, theta: Tensor, frozen: Tensor, lr: Tensor, x: Tensor, y: Tensor, steps: int
) -> Tensor:
    return _rows(theta, x)


def _adapt_backward(
    code: Tensor,
    theta: Tensor,
    frozen: Tensor,
    lr: Tensor,
    x: Tensor,
    y: Tensor,
    steps: int,
    grad_out: Tensor,
    first_order: bool,
    keep: bool,
    lr_grad: bool,
    input_grad: bool,
) -> tuple[Tensor, ...]:
    return contiguous_like(theta), _if_wanted(lr, lr_grad), _if_wanted(x, input_grad)


def _meta_gradient(
    code: Tensor,
    theta: Tensor,
    frozen: Tensor,
    lr: Tensor,
    support_x: Tensor,
    support_y: Tensor,
    query_x: Tensor,
    query_y: Tensor,
    step_weights: Sequence[float],
    steps: int,
    first_order: bool,
    keep: bool,
    gradient: bool,
    lr_grad: bool,
    support_grad: bool,
    query_grad: bool,
) -> tuple[Tensor, ...]:
    wanted = (
        (theta, gradient),
        (lr, gradient and lr_grad),
        (support_x, gradient and support_grad),
        (query_x, gradient and query_grad),
    )
    grads = (_if_wanted(tensor, want) for tensor, want in wanted)
    return theta.new_empty(()), _outputs(query_x), *grads


def _looped(op: Callable[..., Any]) -> Callable[..., Any]:
    """A vmap rule that calls the op once for each sample: a mean over tasks cannot be parted."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        dims = [dim if isinstance(dim, int) else None for dim in in_dims]
        results = [
            op(*(a if dim is None else a.select(dim, i) for a, dim in zip(args, dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        stacked = tuple(map(torch.stack, zip(*results, strict=True)))
        return stacked, (0,) * len(stacked)

    return rule


_FAKES: tuple[Callable[..., Any], ...] = (
    _forward,
    _gradient,
    _hvp,
    _adapt,
    _adapt_backward,
    _meta_gradient,
)

COMPILED = SimpleNamespace()

if backend._C is not None:
    for _name, _fake in zip(NAMES, _FAKES, strict=True):
        _op = getattr(torch.ops.fastmeta, f"task_program_{_name}").default
        register(f"task_program_{_name}", _fake, _looped(_op))
        setattr(COMPILED, _name, _op)
    COMPILED.check_labels = torch.ops.fastmeta.task_program_check_labels.default
    # Composite: they call meta_gradient, which has the fake and the rule.
    COMPILED.meta_loss = torch.ops.fastmeta.task_program_meta_loss.default
    COMPILED.loss_and_gradient = torch.ops.fastmeta.task_program_loss_and_gradient.default
