"""The meta-loss of adapted linear heads on queries: ``linear_head``, then the loss of its outputs.

On a CPU, one kernel gives the loss and all of its gradients while a task is in the cache.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from fastmeta.core import backend
from fastmeta.core.absence import ABSENT, mean_over_present, without_absent
from fastmeta.core.autocast import without_autocast
from fastmeta.core.backend import HEAD_LOSS
from fastmeta.ops._linear_head_arguments import Head, HeadOptions
from fastmeta.ops._registration import register
from fastmeta.ops.linear_head import adapted_head, fake_gradients
from fastmeta.ops.task_linear import task_linear

_INPUTS = 7  # number of tensors among the arguments of the kernel

_SUPPORT = (0, 1)  # indices of x and targets among them, which have no gradient in first order


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
    tasks, queries, features = query.shape
    ways = weight.shape[1]
    return (
        lr.new_empty(tasks),
        x.new_empty(tasks, queries, ways),
        *fake_gradients(x, weight, bias, lr, loss, input_grad and not first_order),
        x.new_empty(tasks, queries, features if input_grad else 0),
        x.new_empty(tasks, queries, ways if loss == "mse" else 0),
    )


register(HEAD_LOSS, _fake)


def composed(
    head: Head, step_sizes: Tensor, query: Tensor, query_targets: Tensor, options: HeadOptions
) -> tuple[Tensor, Tensor]:
    """The mean loss over tasks and the outputs [T, Q, N], of ops with all derivatives."""
    with without_autocast(query.device):  # all in the head's dtype, like the kernel
        weight, bias = adapted_head(head, step_sizes, options)
        if options.loss != "mse":
            query = without_absent(query, query_targets)
        outputs = task_linear(query, weight, bias)
        return _loss(outputs, query_targets, options.loss), outputs


def _loss(outputs: Tensor, targets: Tensor, loss: str) -> Tensor:
    # Every task has Q queries: the mean over all is the mean over tasks of their means.
    if loss == "mse":
        return F.mse_loss(outputs, targets)
    if loss == "logistic":
        each = F.binary_cross_entropy_with_logits(
            outputs.squeeze(2), targets.to(outputs.dtype), reduction="none"
        ).masked_fill(targets == ABSENT, 0)
    else:
        each = F.cross_entropy(
            outputs.flatten(0, 1), targets.flatten(), ignore_index=ABSENT, reduction="none"
        ).view_as(targets)
    return mean_over_present(each, targets)


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
        options: HeadOptions,
    ) -> tuple[Tensor, Tensor]:
        ctx.options = options
        input_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[5]
        losses, outputs, *grads = torch.ops.fastmeta.linear_head_loss(
            x, targets, weight, bias, lr, query, query_targets, options.loss,
            options.weight_decay, options.dual, options.first_order, input_grad,
        )  # fmt: skip
        ctx.save_for_backward(x, targets, weight, bias, lr, query, query_targets, *grads)
        ctx.mark_non_differentiable(outputs)
        return losses.mean().to(x.dtype), outputs

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Any) -> tuple[Any, ...]:
        inputs, kept = ctx.saved_tensors[:_INPUTS], ctx.saved_tensors[_INPUTS:]
        needed = [i for i, n in enumerate(ctx.needs_input_grad[:_INPUTS]) if n]
        if torch.is_grad_enabled():  # create_graph=True: the kernel's gradients have no graph
            x, targets, weight, bias, lr, query, query_targets = inputs
            head = Head(x, targets, weight, bias)
            loss, _ = composed(head, lr, query, query_targets, ctx.options)
            results = torch.autograd.grad(
                loss, [inputs[i] for i in needed], grad_loss, create_graph=True, allow_unused=True
            )
        else:
            scale = float(grad_loss)
            results = tuple(kept[i] if scale == 1 else scale * kept[i] for i in needed)
        grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        for i, grad in zip(needed, results, strict=True):
            grads[i] = None if ctx.options.first_order and i in _SUPPORT else grad
        return tuple(grads)


def head_loss(
    head: Head, step_sizes: Tensor, query: Tensor, query_targets: Tensor, options: HeadOptions
) -> tuple[Tensor, Tensor]:
    """Same as ``composed``, of checked arguments; the outputs are detached.

    Args:
        head: the support, from ``checked_head``.
        step_sizes: [T, K], from ``step_sizes``.
        query: features [T, Q, D]; Q at least 1.
        query_targets: as the head's, for the queries.
        options: how the head is adapted.
    """
    if _uses_kernel(head.x):
        x, targets, weight, bias = head
        return HeadLoss.apply(x, targets, weight, bias, step_sizes, query, query_targets, options)
    loss, outputs = composed(head, step_sizes, query, query_targets, options)
    return loss, outputs.detach()


def _uses_kernel(x: Tensor) -> bool:
    """Whether the kernel takes ``x``: it is built, gradients are on, nothing traces the call."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return torch.is_grad_enabled() and backend.is_available(HEAD_LOSS, x)
