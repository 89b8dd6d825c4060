"""Hessian-vector product of the loss of a linear head, in closed form."""

from __future__ import annotations

from torch import Tensor

from fastmeta.core.absence import without_absent
from fastmeta.core.checks import check_number
from fastmeta.ops import reference
from fastmeta.ops._checks import check_shape
from fastmeta.ops._linear_head_arguments import checked_head
from fastmeta.ops.task_linear import task_linear
from fastmeta.ops.task_matmul import product


def linear_head_hvp(
    x: Tensor,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_vector: Tensor,
    bias_vector: Tensor | None,
    *,
    loss: str = "cross_entropy",
    weight_decay: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    """Product of the Hessian of each task's loss at a linear head with a vector, in closed form.

        z_dot = x weight_vector' + bias_vector,   r_dot = J z_dot
        product = r_dot' x + weight_decay weight_vector,   sum r_dot + weight_decay bias_vector

    J is the derivative of the loss's gradient to the outputs. Two products with x; differentiable
    any number of times.

    Args:
        x, targets, weight, bias, loss, weight_decay: as for ``linear_head``.
        weight_vector, bias_vector: of the shapes of weight and bias; None without a bias.

    Returns:
        The product's part for the weight [T, N, D] and for the bias [T, N] or None; without the
        task dimension for one task.

    Raises:
        TypeError, ValueError: as for ``linear_head``; one of bias and bias_vector is missing.

    Source: Pearlmutter 1994, fast exact multiplication by the Hessian.

    Example:
        >>> import torch
        >>> import fastmeta as fm
        >>> x, y, eye = torch.eye(2), torch.tensor([0, 1]), torch.eye(2)
        >>> fm.linear_head_hvp(x, y, torch.zeros(2, 2), None, eye, None)[0]
        tensor([[ 0.1250, -0.1250],
                [-0.1250,  0.1250]])
    """
    head = checked_head(x, targets, weight, bias, loss)
    weight_decay = check_number("weight_decay", weight_decay)
    if (bias is None) != (bias_vector is None):
        expected, got = ("a tensor", "None") if bias_vector is None else ("None", "a tensor")
        raise ValueError(f"bias_vector: expected {expected} like bias, got {got}")
    vector = checked_head(x, targets, weight_vector, bias_vector, loss)
    check_shape("weight_vector", vector.weight, head.weight.shape)
    if loss != "mse":
        reference.check_label_range(
            head.targets, 2 if loss == "logistic" else head.weight.shape[1], "targets"
        )
    examples = head.x if loss == "mse" else without_absent(head.x, head.targets)
    z_dot = task_linear(examples, vector.weight, vector.bias)
    outputs = task_linear(examples, head.weight, head.bias)
    residual_dot = _residual_tangent(outputs, z_dot, loss, head.targets)
    weight_part = product(residual_dot, examples, transpose_a=True) + weight_decay * vector.weight
    bias_part = None
    if vector.bias is not None:
        bias_part = residual_dot.sum(1) + weight_decay * vector.bias
    if x.dim() == 2:
        return weight_part.squeeze(0), None if bias_part is None else bias_part.squeeze(0)
    return weight_part, bias_part


def _residual_tangent(outputs: Tensor, z_dot: Tensor, loss: str, targets: Tensor) -> Tensor:
    """J z_dot: the tangent of ``reference.head_residual`` at outputs [T, S, N] along z_dot."""
    examples, ways = outputs.shape[1:]
    if loss == "mse":
        return 2 / (examples * ways) * z_dot
    if loss == "logistic":
        p = outputs.sigmoid()
        return reference.mean_of_labelled(p * (1 - p) * z_dot, targets)
    p = outputs.softmax(2)
    return reference.mean_of_labelled(p * (z_dot - (p * z_dot).sum(2, keepdim=True)), targets)
