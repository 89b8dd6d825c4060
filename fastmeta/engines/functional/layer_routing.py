"""Layers of images of a module that is vmapped over tasks, on the kernels of the ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from fastmeta.core.autocast import autocast_dtype
from fastmeta.core.backend import backend_of
from fastmeta.core.dtypes import HALF
from fastmeta.ops.task_batch_norm import task_batch_norm
from fastmeta.ops.task_conv2d import task_conv2d

# What autocast computes in its dtype, and in float32. PyTorch's own comes too late for what is
# vmapped: a convolution, or a linear layer with a bias, has fallen into parts by then.
_NARROW = {
    *(F.conv1d, F.conv2d, F.conv3d),
    *(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
    *(F.linear, F.bilinear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__),
    *(torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.einsum),
}

_WIDE = {
    *(F.batch_norm, F.layer_norm, F.group_norm, F.instance_norm),
    *(F.softmax, F.log_softmax, torch.softmax, torch.log_softmax),
}


def widened(x: Tensor) -> Tensor:
    """Outputs for a loss: under autocast float32, as it gives them to the losses of PyTorch."""
    return x.float() if x.dtype in HALF and torch.is_autocast_enabled(x.device.type) else x


class RoutedLayers(TorchFunctionMode):
    """While it is on, ``F.batch_norm`` and ``F.conv2d`` are those of fastmeta, whoever calls them.

    PyTorch makes a long chain of elementwise ops of a norm's second derivative, and vmap one
    grouped convolution of those of all tasks. What the kernels do not take stays as it is: other
    dtypes, images without a batch, groups of several channels, norms by running statistics; and
    convolutions of bfloat16 on a CPU, which PyTorch multiplies in that type where the hardware can.

    Under autocast, products are of its dtype and norms of float32, vmapped or not.

    Args:
        vmapped: over tasks with weights of their own. If not, convolutions stay as they are too.
        device: of the images; None: autocast is not looked at.

    Example:
        >>> import torch
        >>> x, weight = torch.randn(3, 2, 4, 8, 8), torch.randn(3, 5, 4, 3, 3)
        >>> with RoutedLayers(vmapped=True):
        ...     torch.vmap(torch.nn.functional.conv2d)(x, weight).shape
        torch.Size([3, 2, 5, 6, 6])
    """

    def __init__(self, vmapped: bool, device: torch.device | None = None) -> None:
        super().__init__()
        self._routes: dict[Any, Callable[..., Any]] = {F.batch_norm: _batch_norm}
        if vmapped:
            self._routes[F.conv2d] = _conv2d
        self._narrow = None if device is None else autocast_dtype(device)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._narrow is not None:
            args, kwargs = self._cast(func, (args, kwargs))
        route = self._routes.get(func)
        result = NotImplemented if route is None else route(*args, **kwargs)
        return func(*args, **kwargs) if result is NotImplemented else result

    def _cast(self, func: Callable[..., Any], arguments: Any) -> Any:
        """The arguments in the dtype that autocast computes the function in."""
        if func not in _NARROW and func not in _WIDE:
            return arguments
        dtype = self._narrow if func in _NARROW else torch.float32

        def cast(x: Any) -> Any:
            takes = isinstance(x, Tensor) and x.dtype in (torch.float32, *HALF)
            return x.to(dtype) if takes else x

        return tree_map(cast, arguments)


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
        and backend_of(op, images.device, images.dtype) == "native"
    )
