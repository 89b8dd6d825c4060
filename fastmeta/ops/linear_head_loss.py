"""The meta-loss of adapted linear heads on queries: ``linear_head``, then the loss of its outputs.

On a CPU one kernel gives the loss and all of its gradients while a task is in the cache.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from fastmeta.core import backend
from fastmeta.core.autocast import without_autocast
from fastmeta.core.backend import HEAD_LOSS
from fastmeta.ops._linear_head_arguments import Head
from fastmeta.ops._registration import contiguous_like, register
from fastmeta.ops.linear_head import adapted_head
from fastmeta.ops.task_linear import task_linear

# loss, weight_decay, first_order, dual.
Options = tuple[str, float, bool, bool]

_INPUTS = 7  # tensors among the arguments of the kernel

_SUPPORT = (0, 1)  # of those x and targets, which get nothing to first order


def _fake(
    x: Tensor,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lr: Tensor,
    query: Tensor,
    query_targets: Tensor,
    loss: str,
    weight_decay: float,
    dual: bool,
    first_order: bool,
    input_grad: bool,
) -> tuple[Tensor, ...]:
    tasks, examples, features = x.shape
    queries, ways = query.shape[1], weight.shape[1]
    of_targets = ways if loss == "mse" else 0
    return (
        lr.new_empty(tasks),
        x.new_empty(tasks, queries, ways),
        x.new_empty(tasks, examples, features if input_grad and not first_order else 0),
        x.new_empty(tasks, examples, of_targets),
        contiguous_like(weight),
        x.new_empty(tasks, 0 if bias is None else ways),
        contiguous_like(lr),
        x.new_empty(tasks, queries, features if input_grad else 0),
        x.new_empty(tasks, queries, of_targets),
    )


register(HEAD_LOSS, _fake)


def composed(
    head: Head, rates: Tensor, query: Tensor, query_targets: Tensor, options: Options
) -> tuple[Tensor, Tensor]:
    """The mean loss over tasks and the outputs [T, Q, N], of ops with all derivatives."""
    with without_autocast(query.device):  # all in the head's dtype, as the kernel
        weight, bias = adapted_head(head, rates, *options)
        outputs = task_linear(query, weight, bias)
        return _loss(outputs, query_targets, options[0]), outputs


def _loss(outputs: Tensor, targets: Tensor, loss: str) -> Tensor:
    # Every task has Q queries: the mean over all is the mean over tasks of their means.
    if loss == "mse":
        return F.mse_loss(outputs, targets)
    if loss == "logistic":
        return F.binary_cross_entropy_with_logits(outputs, targets.unsqueeze(2).to(outputs.dtype))
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


class HeadLoss(Function):
    """The mean loss and the outputs, which have no derivative here."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        targets: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lr: Tensor,
        query: Tensor,
        query_targets: Tensor,
        *options: Any,
    ) -> tuple[Tensor, Tensor]:
        loss, weight_decay, first_order, dual = ctx.options = options
        input_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[5]
        losses, outputs, *grads = torch.ops.fastmeta.linear_head_loss(
            x, targets, weight, bias, lr, query, query_targets, loss, weight_decay, dual,
            first_order, input_grad,
        )  # fmt: skip
        ctx.save_for_backward(x, targets, weight, bias, lr, query, query_targets, *grads)
        ctx.mark_non_differentiable(outputs)
        return losses.mean().to(x.dtype), outputs

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Any) -> tuple[Any, ...]:
        inputs, kept = ctx.saved_tensors[:_INPUTS], ctx.saved_tensors[_INPUTS:]
        needed = [i for i, n in enumerate(ctx.needs_input_grad[:_INPUTS]) if n]
        if torch.is_grad_enabled():  # the gradient is to be differentiated
            rates, query, query_targets = inputs[4:]
            loss, _ = composed(Head(*inputs[:4]), rates, query, query_targets, ctx.options)
            wanted = torch.autograd.grad(
                loss, [inputs[i] for i in needed], grad_loss, create_graph=True, allow_unused=True
            )
        else:
            scale = float(grad_loss)
            wanted = tuple(kept[i] if scale == 1 else scale * kept[i] for i in needed)
        grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        first_order = ctx.options[2]
        for i, grad in zip(needed, wanted, strict=True):
            grads[i] = None if first_order and i in _SUPPORT else grad
        return tuple(grads)


def head_loss(
    head: Head, rates: Tensor, query: Tensor, query_targets: Tensor, options: Options
) -> tuple[Tensor, Tensor]:
    """As ``composed``, of checked arguments; the outputs are detached.

    Args:
        head, rates: of the support, as ``checked_head`` and ``step_sizes`` give them.
        query: features [T, Q, D]; Q at least 1.
        query_targets: as the head's, for the queries.
        options: loss, weight_decay, first_order and dual.
    """
    if _takes(head.x):
        return HeadLoss.apply(*head, rates, query, query_targets, *options)
    loss, outputs = composed(head, rates, query, query_targets, options)
    return loss, outputs.detach()


def _takes(x: Tensor) -> bool:
    """Whether the kernel is there for ``x``, and a gradient may be asked for; no transform traces."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return torch.is_grad_enabled() and backend.is_available(HEAD_LOSS, x)
