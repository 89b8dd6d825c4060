"""Lowering of a module for tests: the outputs of its program, or the reason why it has none."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmeta.engines.program.lowering import Lowering
from fastmeta.ops.task_program import reference
from tests.helpers.programs import Raw, lowered


def outputs_of(net: nn.Module, x: Tensor) -> Tensor:
    """Interpret the program: outputs for a batch ``[B, ...]``, in the module's shape."""
    raw = Raw.of(net, F.mse_loss, tuple(x.shape[1:]))
    shape = lowered(net, F.mse_loss, tuple(x.shape[1:])).output_shape
    return reference.forward(*raw, x[None])[0].reshape(len(x), *shape)


def assert_lowers(net: nn.Module, *shape: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, *shape, dtype=torch.float64)
    net = net.double()
    torch.testing.assert_close(outputs_of(net, x), net(x), rtol=1e-13, atol=1e-14)


def reason(net: nn.Module, *shape: int, loss: Callable = F.mse_loss) -> str:
    program = Lowering(net, loss).program(shape or (3,))
    assert isinstance(program, str), program
    return program
