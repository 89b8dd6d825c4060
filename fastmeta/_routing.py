"""Convolutions of a module that is vmapped over tasks, on the kernels of ``task_conv2d``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastmeta._native import backend_of
from fastmeta.ops.task_conv import task_conv2d


class RoutedConvolutions(TorchFunctionMode):
    """While it is on, ``F.conv2d`` is ``fastmeta.task_conv2d``, whoever calls it.

    vmap would make one grouped convolution of those of all tasks. What the kernels do not take
    stays as it is: other dtypes, autocast, images without a batch, groups of several channels; and
    bfloat16 on a CPU, which PyTorch multiplies in that type where the hardware can.

    Example:
        >>> import torch
        >>> x, weight = torch.randn(3, 2, 4, 8, 8), torch.randn(3, 5, 4, 3, 3)
        >>> with RoutedConvolutions():
        ...     torch.vmap(torch.nn.functional.conv2d)(x, weight).shape
        torch.Size([3, 2, 5, 6, 6])
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.conv2d and _takes(*args, **kwargs):
            # Under vmap group norm refuses what is channels-last in memory; contiguous() leaves
            # images of one pixel so.
            out = task_conv2d(*args, **_renamed(kwargs))
            return out.clone(memory_format=torch.contiguous_format)
        return func(*args, **kwargs)


def _takes(input: Tensor, weight: Tensor, *rest: Any, groups: int = 1, **others: Any) -> bool:
    groups = rest[4] if len(rest) > 4 else groups
    # Widened to float32, Conv4-64 takes 1.6 times as long as in PyTorch with AVX512_BF16.
    in_hardware = input.dtype == torch.bfloat16 and input.device.type == "cpu"
    return (
        input.dim() == weight.dim() == 4
        and input.dtype == weight.dtype
        and groups in (1, input.shape[1])
        and not in_hardware
        and not torch.is_autocast_enabled(input.device.type)
        and backend_of("task_conv2d", input.device, input.dtype) == "native"
    )


def _renamed(options: dict[str, Any]) -> dict[str, Any]:
    return {"x" if name == "input" else name: value for name, value in options.items()}
