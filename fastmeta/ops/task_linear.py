"""Linear layer with weights of their own for every task."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta.ops._conv_arguments import check_layer
from fastmeta.ops.task_matmul import has_kernel, product


def task_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Linear layer of each task's examples with the task's own weights: x weight' + bias.

    ``torch.bmm``, with its devices, dtypes, derivatives and transforms, behind checked shapes. On
    a CPU, float32 and float64 of four or more tasks go through a compiled product, which is made
    for few outputs.

    Args:
        x: [T, B, I], or [B, I] for one task.
        weight: [T, O, I], or [O, I]; same dtype and device.
        bias: [T, O], or [O], or None.

    Returns:
        [T, B, O], or [B, O]. Each of the sizes may be 0.

    Raises:
        TypeError: inputs are not floating-point tensors of one dtype.
        ValueError: shapes do not agree, or devices differ.

    Example:
        >>> import torch
        >>> import fastmeta as fm
        >>> fm.task_linear(torch.ones(2, 1, 3), torch.ones(2, 1, 3), torch.tensor([[0.0], [1.0]]))
        tensor([[[3.]],
        <BLANKLINE>
                [[4.]]])
    """
    check_layer(x, weight, bias, "[T, B, I]", "[T, O, I]")
    if x.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"x [T, B, I] and weight [T, O, I]: expected the same I, "
            f"got {list(x.shape)} and {list(weight.shape)}"
        )
    if x.dim() == 2:
        biases = None if bias is None else bias.unsqueeze(0)
        return task_linear(x.unsqueeze(0), weight.unsqueeze(0), biases).squeeze(0)
    if bias is not None and not has_kernel(x):
        return torch.baddbmm(bias.unsqueeze(1), x, weight.mT)
    out = product(x, weight, transpose_b=True)
    return out if bias is None else out + bias.unsqueeze(1)
