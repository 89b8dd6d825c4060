"""Layers of images of a module that is vmapped over tasks, on the kernels of the ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastmeta._native import backend_of
from fastmeta.ops.task_batch_norm import task_batch_norm
from fastmeta.ops.task_conv import task_conv2d


class RoutedLayers(TorchFunctionMode):
    """While it is on, ``F.batch_norm`` and ``F.conv2d`` are those of fastmeta, whoever calls them.

    PyTorch makes a long chain of elementwise ops of a norm's second derivative, and vmap one
    grouped convolution of those of all tasks. What the kernels do not take stays as it is: other
    dtypes, autocast, images without a batch, groups of several channels, norms by running
    statistics; and convolutions of bfloat16 on a CPU, which PyTorch multiplies in that type where
    the hardware can.

    Args:
        vmapped: over tasks with weights of their own. If not, convolutions stay as they are too.

    Example:
        >>> import torch
        >>> x, weight = torch.randn(3, 2, 4, 8, 8), torch.randn(3, 5, 4, 3, 3)
        >>> with RoutedLayers(vmapped=True):
        ...     torch.vmap(torch.nn.functional.conv2d)(x, weight).shape
        torch.Size([3, 2, 5, 6, 6])
    """

    def __init__(self, vmapped: bool) -> None:
        super().__init__()
        self._routes: dict[Any, Callable[..., Any]] = {F.batch_norm: _batch_norm}
        if vmapped:
            self._routes[F.conv2d] = _conv2d

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        route = self._routes.get(func)
        result = NotImplemented if route is None else route(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {})) if result is NotImplemented else result


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    # Widened to float32, Conv4-64 takes 1.6 times as long as in PyTorch with AVX512_BF16.
    in_hardware = input.dtype == torch.bfloat16 and input.device.type == "cpu"
    takes = not in_hardware and _takes("task_conv2d", input, weight)
    if not takes or groups not in (1, input.shape[1]):
        return NotImplemented
    # Contiguous images come out as such, and modules may view them as they like.
    return task_conv2d(input.contiguous(), weight, bias, stride, padding, dilation, groups)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    by_the_batch = training and running_mean is None and running_var is None
    if not by_the_batch or not _takes("task_batch_norm", input, input):
        return NotImplemented
    return task_batch_norm(input, weight, bias, eps)


def _takes(op: str, images: Tensor, other: Tensor) -> bool:
    """Whether the op has kernels for images of a batch, and what goes with them."""
    return (
        images.dim() == other.dim() == 4
        and images.dtype == other.dtype
        and not torch.is_autocast_enabled(images.device.type)
        and backend_of(op, images.device, images.dtype) == "native"
    )
