"""The ops of a task program: forward, gradient, curvature products, inner loop, meta-gradient.

Raw ops: tensors are [T, B, ...], parameters theta [P] or [T, P], of which the first A are adapted,
frozen parameters [F], step sizes [K or 1, T or 1, A or 1]; ``bytecode`` documents the code. Weights
of examples [T, B] come last; a label -1 marks an absent example. A batch norm takes neither.
``fastmeta.engines.program`` joins them to autograd. They work on fake tensors, so under
torch.compile. Under vmap they run in a loop.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fastmeta.core import backend
from fastmeta.ops._registration import contiguous_like, register
from fastmeta.ops.task_program import reference
from fastmeta.ops.task_program.arguments import AdaptBackwardArguments, MetaGradientArguments

NAMES = ("forward", "gradient", "hvp", "products", "adapt", "adapt_backward", "meta_gradient")


def implementation(like: Any) -> SimpleNamespace | ModuleType:
    """The functions of ``NAMES``, compiled or in plain PyTorch.

    Warns once if it is plain PyTorch although compiled functions were to be expected.

    Args:
        like: a tensor or a layout with the dtype and the device to run on.
    """
    return COMPILED if backend.is_native(backend.PROGRAM, like) else reference


def _outputs(x: Tensor) -> Tensor:
    """Fake outputs [T, B, n]."""
    # n is in the code, and a fake tensor has no values to read it from.
    return x.new_empty(*x.shape[:2], torch.library.get_ctx().new_dynamic_size())


def _per_task(theta: Tensor, x: Tensor) -> Tensor:
    """Fake parameters [T, P]."""
    return theta.new_empty(x.shape[0], theta.shape[-1])


def _if_required(like: Tensor, required: bool) -> Tensor:
    """A fake gradient; an absent one is an empty tensor."""
    return contiguous_like(like) if required else like.new_empty(0)


def _forward(code: Tensor, theta: Tensor, frozen: Tensor, x: Tensor) -> Tensor:
    return _outputs(x)


def _gradient(
    code: Tensor,
    theta: Tensor,
    frozen: Tensor,
    x: Tensor,
    y: Tensor,
    input_grad: bool,
    weight: Tensor | None = None,
) -> tuple[Tensor, ...]:
    outputs, loss = _outputs(x), x.new_empty(x.shape[0])
    return loss, outputs, _per_task(theta, x), _if_required(x, input_grad)


def _hvp(
    code: Tensor,
    theta: Tensor,
    frozen: Tensor,
    x: Tensor,
    y: Tensor,
    vector: Tensor,
    input_grad: bool,
    weight: Tensor | None = None,
) -> tuple[Tensor, ...]:
    return _per_task(theta, x), _if_required(x, input_grad)


def _products(
    code: Tensor,
    theta: Tensor,
    frozen: Tensor,
    x: Tensor,
    y: Tensor,
    vectors: Tensor,
    gauss_newton: bool,
    weight: Tensor | None = None,
) -> Tensor:
    return theta.new_empty(*vectors.shape[:2], theta.shape[-1])


def _adapt(
    code: Tensor,
    theta: Tensor,
    frozen: Tensor,
    lr: Tensor,
    x: Tensor,
    y: Tensor,
    steps: int,
    shared: int = 0,
    weight: Tensor | None = None,
) -> Tensor:
    return theta.new_empty(x.shape[0], theta.shape[-1] - shared)


def _adapt_backward(*arguments: Any) -> tuple[Tensor, ...]:
    a = AdaptBackwardArguments(*arguments)
    return contiguous_like(a.theta), _if_required(a.lr, a.lr_grad), _if_required(a.x, a.input_grad)


def _meta_gradient(*arguments: Any) -> tuple[Tensor, ...]:
    a = MetaGradientArguments(*arguments)
    return (
        a.theta.new_empty(()),
        _outputs(a.query_x),
        _if_required(a.theta, a.gradient),
        _if_required(a.lr, a.gradient and a.lr_grad),
        _if_required(a.support_x, a.gradient and a.support_grad),
        _if_required(a.query_x, a.gradient and a.query_grad),
    )


def _looped(op: Callable[..., Any]) -> Callable[..., Any]:
    """A vmap rule that calls the op once for each sample."""
    # Samples cannot be folded into the tasks: the meta-loss is a mean over all of them.

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
    _products,
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
    # Composite ops: they call meta_gradient, which has the fake and the rule.
    COMPILED.meta_loss = torch.ops.fastmeta.task_program_meta_loss.default
    COMPILED.loss_and_gradient = torch.ops.fastmeta.task_program_loss_and_gradient.default
