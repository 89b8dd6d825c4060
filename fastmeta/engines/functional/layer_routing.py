"""Routing of a vmapped module's layers to what is fast for the weights of many tasks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from fastmeta.core.autocast import autocast_dtype
from fastmeta.core.backend import backend_of
from fastmeta.core.dtypes import HALF
from fastmeta.ops.activation import activation
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

# Under vmap a tensor has no graph of its own: flags are False, and hooks are never called.
_HIDDEN: dict[Any, str] = {
    **{vars(torch._C.TensorBase)[n].__get__: n for n in ("requires_grad", "is_leaf", "grad_fn")},
    Tensor.register_hook: "register_hook",
    Tensor.retain_grad: "retain_grad",
}
# Calls that make a number of a tensor of one element: branches on data, and sizes that it gives.
_NUMBERS = {
    *(Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__),
    *(Tensor.item, Tensor.tolist),
}
_TORCH = str(Path(torch.__file__).parent)
_DISPATCH = {f"{_TORCH}/_tensor.py", f"{_TORCH}/overrides.py"}  # between a method and a mode

_WIDE = {
    *(F.batch_norm, F.layer_norm, F.group_norm, F.instance_norm),
    *(F.softmax, F.log_softmax, torch.softmax, torch.log_softmax),
}


def widened(x: Tensor) -> Tensor:
    """Outputs for a loss: float32 under autocast, as autocast casts the inputs of losses."""
    return x.float() if x.dtype in HALF and torch.is_autocast_enabled(x.device.type) else x


class RoutedLayers(TorchFunctionMode):
    """Mode in which norms, activations and convolutions run on the kernels of fastmeta's ops.

    PyTorch computes the second derivative of a norm and of GELU, mish, SiLU and softplus by a long
    chain of elementwise ops. vmap has no rule for the gradient of mish, and turns the convolutions
    of all tasks into one grouped convolution. Calls that the kernels do not support run in PyTorch:
    other dtypes, activations in place, images without a batch, groups of several channels, norms by
    running statistics, and bfloat16 convolutions on a CPU, which may have instructions for them.

    Under autocast, products run in its dtype and norms in float32, vmapped or not.

    Args:
        vmapped: whether tasks are vmapped.
        device: the device of the images, whose autocast applies; None: no autocast.

    Raises:
        RuntimeError: the module uses a property or method of a tensor that vmap hides.

    Example:
        >>> import torch
        >>> x, weight = torch.randn(3, 2, 4, 8, 8), torch.randn(3, 5, 4, 3, 3)
        >>> with RoutedLayers(vmapped=True):
        ...     torch.vmap(torch.nn.functional.conv2d)(x, weight).shape
        torch.Size([3, 2, 5, 6, 6])
    """

    def __init__(self, vmapped: bool, device: torch.device | None = None) -> None:
        super().__init__()
        self._vmapped = vmapped
        # These are routed without vmap too: their second derivative is the same chain.
        self._routes: dict[Any, Callable[..., Any]] = {
            F.batch_norm: self._batch_norm,
            **_ACTIVATIONS,
        }
        self.present: Tensor | None = None  # [B]: the examples of which norms take statistics
        if vmapped:
            self._routes |= {F.embedding: _embedding, F.conv2d: _conv2d, F.linear: _linear}
        self._device = device

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._vmapped and func in _HIDDEN and not _is_called_by_torch(sys._getframe(1)):
            raise RuntimeError(f"its forward uses {_HIDDEN[func]} of a tensor, which vmap hides")
        if self._vmapped and func in _NUMBERS:
            return func(_shared_by_tasks(args[0]), *args[1:], **kwargs)
        # Asked at each call: a part of a forward may switch autocast on or off.
        narrow = None if self._device is None else autocast_dtype(self._device)
        if narrow is not None:
            args, kwargs = _cast(func, (args, kwargs), narrow)
        route = self._routes.get(func)
        # A route answers NotImplemented for a call that its kernel does not support.
        result = NotImplemented if route is None else route(*args, **kwargs)
        return func(*args, **kwargs) if result is NotImplemented else result

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if not (training and running_mean is None and running_var is None):
            return NotImplemented
        if self.present is not None:
            return _norm_of_present(input, weight, bias, eps, self.present)
        if not _is_supported("task_batch_norm", input, input):
            return NotImplemented
        return task_batch_norm(input, weight, bias, eps)


def _shared_by_tasks(tensor: Tensor) -> Tensor:
    """One task's tensor, if all tasks have the same, so that they take the same branch.

    Otherwise the tensor itself, of which vmap then refuses to make a number.
    """
    functorch = torch._C._functorch
    if not functorch.is_batchedtensor(tensor):
        return tensor
    values = functorch.get_unwrapped(tensor).movedim(functorch.maybe_get_bdim(tensor), 0)
    if functorch.is_functorch_wrapped_tensor(values) or not bool((values == values[0]).all()):
        return tensor
    return values[0].detach()


def _cast(func: Callable[..., Any], arguments: Any, narrow: torch.dtype) -> Any:
    """Cast the arguments to the dtype in which autocast computes the function."""
    if func not in _NARROW and func not in _WIDE:
        return arguments
    dtype = narrow if func in _NARROW else torch.float32

    def cast(x: Any) -> Any:
        # Autocast leaves float64 and integers unchanged.
        is_cast = isinstance(x, Tensor) and x.dtype in (torch.float32, *HALF)
        return x.to(dtype) if is_cast else x

    return tree_map(cast, arguments)


def _is_called_by_torch(frame: FrameType | None) -> bool:
    """Whether the caller is PyTorch itself, which only chooses between kernels by these flags."""
    while frame is not None and frame.f_code.co_filename in _DISPATCH:
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename.startswith(f"{_TORCH}/")


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
    if not is_supported or not _is_mapped(weight) or groups not in (1, input.shape[1]):
        return NotImplemented
    # The op keeps the layout of its input; modules may call view() on contiguous images only.
    return task_conv2d(input.contiguous(), weight, bias, stride, padding, dilation, groups)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    # Of W x' the gradient to W comes in W's own layout, of x W' transposed: a copy to the arena
    # then reads it column by column. The outputs are transposed instead, so they must be smaller.
    if input.dim() != 2 or weight.shape[-1] <= len(input) or not _is_mapped(weight):
        return NotImplemented
    outputs = torch.mm(weight, input.mT).mT
    return outputs if bias is None else outputs + bias


def _is_mapped(weight: Tensor) -> bool:
    """Whether each task has its own; if not, PyTorch takes all tasks' examples as one batch."""
    return bool(torch._C._functorch.is_batchedtensor(weight))


def _embedding(
    input: Tensor, weight: Tensor, padding_idx: int | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    if padding_idx is None:
        return NotImplemented
    # PyTorch's own rule for vmap gives no gradient to the padding of the first task only.
    rows = F.embedding(input, weight, None, *args, **kwargs)
    is_padding = input == padding_idx % len(weight)
    return torch.where(is_padding.unsqueeze(-1), rows.detach(), rows)


def _norm_of_present(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, present: Tensor
) -> Tensor:
    """Batch norm ``[B, C, ...]`` by the statistics of the examples that are present ``[B]``."""
    if len(input) != len(present):
        raise ValueError(
            f"weight: expected a batch norm of the {len(present)} examples, some of which have "
            f"weight 0 or label -1, got one of {len(input)} rows"
        )
    dims, ones = [0, *range(2, input.dim())], [1] * (input.dim() - 1)
    mask = present.to(input.dtype).view(-1, *ones)
    # At least one: of a task without examples nothing is read.
    count = (mask.sum() * (input[0, 0].numel() if input.dim() > 1 else 1)).clamp_min(1)
    mean = (mask * input).sum(dims, keepdim=True) / count
    centred = input - mean
    variance = (mask * centred.square()).sum(dims, keepdim=True) / count
    normalised = centred * (variance + eps).rsqrt()
    shape = [1, -1, *ones[1:]]
    if weight is not None:
        normalised = normalised * weight.view(shape)
    return normalised if bias is None else normalised + bias.view(shape)


def _gelu(input: Tensor, *, approximate: str = "none") -> Tensor:
    return _activation(input, {"none": "gelu", "tanh": "gelu_tanh"}.get(approximate))


def _silu(input: Tensor, inplace: bool = False) -> Tensor:
    return _activation(input, None if inplace else "silu")


def _mish(input: Tensor, inplace: bool = False) -> Tensor:
    return _activation(input, None if inplace else "mish")


def _softplus(input: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    return _activation(input, "softplus", beta=beta, threshold=threshold)


def _activation(input: Tensor, kind: str | None, **numbers: float) -> Tensor:
    if kind is None or backend_of("activation", input.device, input.dtype) != "native":
        return NotImplemented
    return activation(input, kind, **numbers)


_ACTIVATIONS: dict[Any, Callable[..., Any]] = {
    F.gelu: _gelu,
    F.silu: _silu,
    F.mish: _mish,
    F.softplus: _softplus,
}


def _is_supported(op: str, images: Tensor, other: Tensor) -> bool:
    """Whether the op has a native kernel for a batch of images and the other tensor."""
    return (
        images.dim() == other.dim() == 4
        and images.dtype == other.dtype
        and backend_of(op, images.device, images.dtype) == "native"
    )
