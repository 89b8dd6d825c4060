"""The passes of a task program that an inner loop is made of, where a rule takes the steps."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from fastmeta.core.derivatives import Tensors
from fastmeta.engines.program.call import Call
from fastmeta.ops.task_program.bytecode import at_step


class ProgramPasses:
    """Run each pass of ``fastmeta.engines.inner_loop.Passes`` as one compiled call for all tasks.

    Args:
        call: of the program.
    """

    # Copied below, so the way back needs nothing of the module to stay as it is.
    constants: tuple[Tensor, ...] = ()

    def __init__(self, call: Call) -> None:
        self.layout, self._call = call.program.layout, call
        self._frozen = call.frozen(call.program.adapted[0])

    def conditions(self) -> AbstractContextManager[None]:
        return nullcontext()

    def random_state(self, device: torch.device) -> None:
        """Nothing: programs draw no random numbers."""

    def gradient(self, k: int, theta: Tensor, data: Tensors) -> Tensor:
        batch = data["support_x"], data["support_y"]
        return self._call.ops.gradient(self._code(k), theta, self._frozen, *batch, False)[2]

    def curvature(
        self,
        k: int,
        theta: Tensor,
        direction: Tensor,
        data: Tensors,
        inputs: Tensors,
        random: None,
    ) -> tuple[Tensor, Tensors]:
        at = self._code(k), theta, self._frozen, data["support_x"], data["support_y"]
        wanted = "support_x" in inputs
        product, mixed = self._call.ops.hvp(*at, direction, wanted)
        return product, {"support_x": mixed} if wanted else {}

    def query(
        self, k: int, theta: Tensor, data: Tensors, wants: set[str], weight: float
    ) -> tuple[Tensor, Tensor, Tensors]:
        at = self._code(k), theta, self._frozen, data["query_x"], data["query_y"]
        wanted = "query_x" in wants
        losses, outputs, to_theta, to_x = self._call.ops.gradient(*at, wanted)
        grads = {"theta": to_theta, **({"query_x": to_x} if wanted else {})}
        if weight != 1:
            grads = {name: weight * grad for name, grad in grads.items()}
        return losses, self._call.shaped(outputs), grads if wants else {}

    def _code(self, k: int) -> Tensor:
        """The program at theta_k."""
        program = self._call.program
        return at_step(program.code, k) if program.per_step else program.code
