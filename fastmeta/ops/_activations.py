"""The kinds of activations that kernels know, and each of them in plain PyTorch."""

from __future__ import annotations

from enum import IntEnum

import torch.nn.functional as F
from torch import Tensor


class Activation(IntEnum):
    """The kinds of ``csrc/execution/activation.h``, with what their numbers a and b are."""

    RELU = 0
    LEAKY_RELU = 1  # a: slope
    ELU = 2  # a: alpha
    GELU = 3
    GELU_TANH = 4
    SILU = 5
    TANH = 6
    SIGMOID = 7
    SOFTPLUS = 8  # a: beta, b: threshold
    MISH = 9


def plain_activation(x: Tensor, kind: int, a: float, b: float) -> Tensor:
    """An ``Activation`` of each element; a and b are its numbers."""
    functions = {
        Activation.RELU: lambda: F.relu(x),
        Activation.LEAKY_RELU: lambda: F.leaky_relu(x, a),
        Activation.ELU: lambda: F.elu(x, a),
        Activation.GELU: lambda: F.gelu(x),
        Activation.GELU_TANH: lambda: F.gelu(x, approximate="tanh"),
        Activation.SILU: lambda: F.silu(x),
        Activation.TANH: lambda: x.tanh(),
        Activation.SIGMOID: lambda: x.sigmoid(),
        Activation.SOFTPLUS: lambda: F.softplus(x, a, b),
        Activation.MISH: lambda: F.mish(x),
    }
    return functions[Activation(kind)]()
