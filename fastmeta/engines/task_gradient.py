"""The gradient of each task's loss as a differentiable function of parameters and examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastmeta.core.checks import check_choice, refuse_inference_mode
from fastmeta.core.derivatives import derivative
from fastmeta.core.memory import kept_pages
from fastmeta.core.module_inputs import inputs_of
from fastmeta.core.parameter_layout import ParameterLayout
from fastmeta.core.plain_module import plain_module
from fastmeta.core.trees import Tree
from fastmeta.engines.autograd import entry_point
from fastmeta.engines.base import NORM_STATISTICS, Examples, InnerLoopOptions, Loss
from fastmeta.engines.checks import check_arena, check_examples
from fastmeta.engines.functional.engine import FunctionalEngine
from fastmeta.engines.program.call import Call
from fastmeta.engines.program.engine import ProgramEngine
from fastmeta.engines.program.trace import LoweringError
from fastmeta.engines.task_call import engines_of, names_of


class TaskGradient(NamedTuple):
    """The gradient of each task's loss, the losses and the outputs.

    Attributes:
        grads: ``[T, P]``, in the order of the parameters.
        losses: ``[T]``.
        outputs: ``[T, B, ...]``, detached.
    """

    grads: Tensor
    losses: Tensor
    outputs: Tree


def task_gradient(
    module: nn.Module,
    loss: Loss,
    params: Tensor | Mapping[str, Tensor],
    x: Tree,
    y: Tree,
    weight: Tensor | None = None,
    *,
    norm_statistics: str = "batch",
) -> TaskGradient:
    """The gradient of each task's loss to its parameters, itself differentiable.

    One step of an inner loop of your own: of a test-time-training layer, a neural memory, a learned
    optimizer. With T = N tasks of one example it gives the gradients of N examples. For an upstream
    gradient V of ``grads``, the parameters get ``H V`` and the examples ``d<grads, V>``.

    By a compiled task program if the module and the loss lower to one, else by autograd and vmap.

    Args:
        module: any module.
        loss: ``loss(outputs, targets)`` of one task -> scalar, the mean over its examples.
        params: as for ``fastmeta.task_call``: ``[P]``, ``[T, P]``, or a dict from names to
            ``[T, *shape]``, whose gradient is then the one that ``grads`` has.
        x: ``[T, B, ...]``, or a tree as for ``MAML.meta_loss``.
        y: ``[T, B]`` int64 labels, or floating-point targets ``[T, B, ...]``, or a tree. An example
            with the label -1 is absent.
        weight: ``[T, B]``: a task's loss is the sum of its examples' losses times it, without a
            division; None: the mean that the loss takes.
        norm_statistics: as for ``fastmeta.MAML``.

    Returns:
        ``grads`` and ``losses`` are differentiable any number of times in ``params``, ``x``, ``y``,
        ``weight`` and the module's own parameters.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
        RuntimeError: inference mode, which has no gradients.

    Example:
        >>> import torch
        >>> import fastmeta as fm
        >>> net = torch.nn.Linear(1, 1, bias=False)
        >>> theta = torch.tensor([3.0], requires_grad=True)
        >>> x, y = torch.full((2, 5, 1), 2.0), torch.zeros(2, 5, 1)
        >>> grads, losses, _ = fm.task_gradient(net, torch.nn.functional.mse_loss, theta, x, y)
        >>> grads.tolist()  # d/dw mean (2 w)^2 = 8 w
        [[24.0], [24.0]]
        >>> torch.autograd.grad(grads.sum(), theta)[0].tolist()
        [16.0]
    """
    module = plain_module("module", module)
    check_choice("norm_statistics", norm_statistics, NORM_STATISTICS)
    names = names_of(module, params) if isinstance(params, Mapping) else None
    layout = ParameterLayout.of(module, names)
    theta = layout.flatten(params) if isinstance(params, Mapping) else params
    examples = Examples(inputs_of(module, "x", x), y, "", weight)
    return gradient_at(module, loss, theta, examples, norm_statistics, layout)


@entry_point
def gradient_at(
    module: nn.Module,
    loss: Loss,
    theta: Tensor,
    examples: Examples,
    norm_statistics: str,
    layout: ParameterLayout,
    of_losses: bool = False,
) -> TaskGradient:
    """``task_gradient`` at an arena of the layout's parameters.

    ``of_losses``: the losses will be differentiated, so that their gradients are kept.
    """
    tasks = check_examples(layout, examples)
    check_arena("params", layout, theta, tasks)
    refuse_inference_mode("the gradient of the loss is asked for")
    every = len(layout.names) == sum(p.requires_grad for p in module.parameters())
    adapt = None if every else layout.names
    options = InnerLoopOptions(steps=0, norm_statistics=norm_statistics, adapt=adapt)
    program, functional = engines_of(module, loss, options)
    with kept_pages():
        try:
            return _by_program(program, functional, theta, examples, of_losses)
        except LoweringError:
            return TaskGradient(*functional.task_gradients(theta, examples))


def _by_program(
    program: ProgramEngine,
    functional: FunctionalEngine,
    theta: Tensor,
    examples: Examples,
    of_losses: bool,
) -> TaskGradient:
    call, (x, y, _, weight) = program.call(theta, examples), examples
    if not torch.is_grad_enabled():
        return TaskGradient(*_values(call, theta, x, y, weight)[:3])
    if call.program.shared_names:
        raise LoweringError("parameters that are not given may need a gradient")
    if theta.requires_grad or x.requires_grad:
        inputs = theta, x, y, weight
        return TaskGradient(*_Compiled.apply(call, functional, of_losses, *inputs))
    return TaskGradient(*_values(call, theta, x, y, weight)[:3])


def _values(
    call: Call, theta: Tensor, x: Tensor, y: Tensor, weight: Tensor | None, x_grad: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients, losses and outputs, and the gradient to x if it is asked for."""
    arena, frozen = call.with_shared(theta), call.frozen(theta)
    losses, outputs, grads, of_x = call.ops.gradient(
        call.program.code, arena, frozen, x, y, x_grad, weight
    )
    return call.program.by_kind(grads)[0].contiguous(), losses, call.shaped(outputs), of_x


class _Compiled(torch.autograd.Function):
    """Gradients, losses and outputs by the program's ops; the backward is a product."""

    @staticmethod
    def forward(
        ctx: Any,
        call: Call,
        functional: FunctionalEngine,
        of_losses: bool,
        theta: Tensor,
        x: Tensor,
        y: Tensor,
        weight: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        x_grad = of_losses and ctx.needs_input_grad[4]
        grads, losses, outputs, of_x = _values(call, theta, x, y, weight, x_grad)
        ctx.call, ctx.functional = call, functional
        # With the losses' gradients their backward needs no pass of its own.
        kept = (grads, of_x if x_grad else None) if of_losses else (None, None)
        ctx.save_for_backward(theta, x, y, weight, *kept)
        ctx.mark_non_differentiable(outputs)
        ctx.set_materialize_grads(False)
        return grads, losses, outputs

    @staticmethod
    def backward(
        ctx: Any, v: Tensor | None, to_losses: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        # With create_graph=True the result has a derivative too, which the ops have not.
        take = _differentiable_products if torch.is_grad_enabled() else _products
        with kept_pages():
            to_theta, to_x = take(ctx, v, to_losses)
        return None, None, None, to_theta, to_x, None, None


def _products(
    ctx: Any, v: Tensor | None, to_losses: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients to theta and x from those to ``grads`` ``[T, P]`` and losses ``[T]``."""
    call, x_grad = ctx.call, ctx.needs_input_grad[4]
    theta, x, y, weight, grads, of_x = ctx.saved_tensors
    code, frozen = call.program.code, call.frozen(theta)
    to_theta: Tensor | None = None
    to_x: Tensor | None = None
    if v is not None:
        product, mixed = call.ops.hvp(code, theta, frozen, x, y, v.contiguous(), x_grad, weight)
        to_theta, to_x = product.sum_to_size(theta.shape), mixed if x_grad else None
    if to_losses is not None:
        if grads is None:
            _, _, grads, of_x = call.ops.gradient(code, theta, frozen, x, y, x_grad, weight)
        of_theta = (to_losses[:, None] * grads).sum_to_size(theta.shape)
        to_theta = of_theta if to_theta is None else to_theta + of_theta
        if x_grad:
            of_x = to_losses.view(-1, *[1] * (x.ndim - 1)) * of_x
            to_x = of_x if to_x is None else to_x + of_x
    return to_theta, to_x


def _differentiable_products(
    ctx: Any, v: Tensor | None, to_losses: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The same, with a graph."""
    theta, x, y, weight, *_ = ctx.saved_tensors
    needed = ctx.needs_input_grad[3:5]
    grads, losses, _ = ctx.functional.task_gradients(theta, Examples(x, y, "", weight))
    pairs = [(o, u) for o, u in ((grads, v), (losses, to_losses)) if u is not None]
    outputs, upstream = zip(*pairs, strict=True)
    sources = [tensor for tensor, need in zip((theta, x), needed, strict=True) if need]
    found = iter(derivative(outputs, upstream, sources, create_graph=True))
    to_theta, to_x = (next(found) if need else None for need in needed)
    return to_theta, to_x
