"""Routing of a vmapped module's image layers to the kernels of the ops."""

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

# Functions that autocast computes in its dtype, and functions that it computes in float32. PyTorch
# itself casts below vmap, where a convolution or a linear layer with a bias is already decomposed.
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
    """Outputs for a loss: float32 under autocast, as autocast casts the inputs of losses."""
    return x.float() if x.dtype in HALF and torch.is_autocast_enabled(x.device.type) else x


class RoutedLayers(TorchFunctionMode):
    """Mode in which ``F.batch_norm`` and ``F.conv2d`` run on the kernels of fastmeta's ops.

    PyTorch computes the second derivative of a norm by a long chain of elementwise ops, and vmap
    turns the convolutions of all tasks into one grouped convolution. Calls that the kernels do not
    support run in PyTorch: other dtypes, images without a batch, groups of several channels, norms
    by running statistics, and bfloat16 convolutions on a CPU, which may have instructions for them.

    Under autocast, products run in its dtype and norms in float32, vmapped or not.

    Args:
        vmapped: whether tasks are vmapped with weights of their own. If not, convolutions are not
            routed.
        device: the device of the images, whose autocast applies; None: no autocast.

    Example:
        >>> import torch
        >>> x, weight = torch.randn(3, 2, 4, 8, 8), torch.randn(3, 5, 4, 3, 3)
        >>> with RoutedLayers(vmapped=True):
        ...     torch.vmap(torch.nn.functional.conv2d)(x, weight).shape
        torch.Size([3, 2, 5, 6, 6])
    """

    def __init__(self, vmapped: bool, device: torch.device | None = None) -> None:
        super().__init__()
        # Batch norms are routed without vmap too: their second derivative is the same chain.
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
        # A route answers NotImplemented for a call that its kernel does not support.
        result = NotImplemented if route is None else route(*args, **kwargs)
        return func(*args, **kwargs) if result is NotImplemented else result

    def _cast(self, func: Callable[..., Any], arguments: Any) -> Any:
        """Cast the arguments to the dtype in which autocast computes the function."""
        if func not in _NARROW and func not in _WIDE:
            return arguments
        dtype = self._narrow if func in _NARROW else torch.float32

        def cast(x: Any) -> Any:
            # Autocast leaves float64 and integers unchanged.
            is_cast = isinstance(x, Tensor) and x.dtype in (torch.float32, *HALF)
            return x.to(dtype) if is_cast else x

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
    is_supported = not in_hardware and _is_supported("task_conv2d", input, weight)
    if not is_supported or groups not in (1, input.shape[1]):
        return NotImplemented
    # The op keeps the layout of its input; modules may call view() on contiguous images only.
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
    uses_batch_statistics = training and running_mean is None and running_var is None
    if not uses_batch_statistics or not _is_supported("task_batch_norm", input, input):
        return NotImplemented
    return task_batch_norm(input, weight, bias, eps)


def _is_supported(op: str, images: Tensor, other: Tensor) -> bool:
    """Whether the op has a native kernel for a batch of images and the other tensor."""
    return (
        images.dim() == other.dim() == 4
        and images.dtype == other.dtype
        and backend_of(op, images.device, images.dtype) == "native"
    )
