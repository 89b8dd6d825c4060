"""The passes of a task program, for inner loops whose rule steps between compiled calls."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from fastmeta.core.derivatives import Tensors
from fastmeta.engines.base import Examples
from fastmeta.engines.program.call import Call
from fastmeta.ops.task_program.bytecode import at_step


class ProgramPasses:
    """Run each pass of ``fastmeta.engines.inner_loop.Passes`` as one compiled call for all tasks.

    Args:
        call: of the program.
    """

    # The frozen parameters are copied below: the backward reads nothing of the module.
    constants: tuple[Tensor, ...] = ()

    def __init__(self, call: Call) -> None:
        self.layout, self._call = call.program.layout, call
        self._frozen = call.frozen(call.program.adapted[0])

    def conditions(self) -> AbstractContextManager[None]:
        return nullcontext()

    def random_state(self, device: torch.device) -> None:
        """None: programs draw no random numbers."""

    def gradient(self, k: int, theta: Tensor, support: Examples) -> Tensor:
        frozen, ops = self._frozen, self._call.ops
        return ops.gradient(self._code(k), theta, frozen, support.x, support.y, False)[2]

    def curvature(
        self,
        k: int,
        theta: Tensor,
        direction: Tensor,
        support: Examples,
        requires: set[str],
        random: None,
    ) -> tuple[Tensor, Tensors]:
        at = self._code(k), theta, self._frozen, support.x, support.y
        x_grad = support.x_name in requires
        product, mixed = self._call.ops.hvp(*at, direction, x_grad)
        return product, {support.x_name: mixed} if x_grad else {}

    def query(
        self, k: int, theta: Tensor, query: Examples, requires: set[str], weight: float
    ) -> tuple[Tensor, Tensor, Tensors]:
        at = self._code(k), theta, self._frozen, query.x, query.y
        x_grad = query.x_name in requires
        losses, outputs, to_theta, to_x = self._call.ops.gradient(*at, x_grad)
        grads = {"theta": to_theta, **({query.x_name: to_x} if x_grad else {})}
        if weight != 1:
            grads = {name: weight * grad for name, grad in grads.items()}
        return losses, self._call.shaped(outputs), grads if requires else {}

    def _code(self, k: int) -> Tensor:
        """The program at theta_k."""
        program = self._call.program
        return at_step(program.code, k) if program.per_step else program.code
