"""Passes of a task program, for inner loops whose rule takes its steps between compiled calls."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fastmeta.core.derivatives import Tensors
from fastmeta.core.pieces import Gradient, joined
from fastmeta.engines.base import Examples
from fastmeta.engines.inner_loop import SHARED
from fastmeta.engines.program.call import Call
from fastmeta.ops.task_program.bytecode import at_step


class ProgramPasses:
    """Runs each pass of ``fastmeta.engines.inner_loop.Passes`` as one compiled call for all tasks.

    Args:
        call: the call of the program whose ops compute the passes.
    """

    # The frozen parameters are copied in __init__: the backward reads nothing of the module.
    constants: tuple[Tensor, ...] = ()

    def __init__(self, call: Call) -> None:
        self.layout, self._call = call.program.layout, call
        self._frozen = call.frozen(call.program.learned[0])
        # The parameters that the tasks share, by the loop's names: a program reads no other tensor.
        self.outer: Tensors = {f"{SHARED}{name}": p for name, p in call.program.shared.items()}
        self._tail = torch.cat(
            [p.detach().reshape(-1) for p in self.outer.values()] or [self._frozen.new_empty(0)]
        )

    def conditions(self) -> AbstractContextManager[None]:
        return nullcontext()

    def random_state(self, device: torch.device) -> None:
        """None: programs draw no random numbers."""

    def gradient(self, k: int, theta: Tensor, support: Examples) -> Tensor:
        ops, code, arena, data = self._call.ops, self._code(k), self._arena(theta), support
        _, _, grads, _ = ops.gradient(code, arena, self._frozen, data.x, data.y, False, data.weight)
        return self._by_kind(grads, set())[0]

    def linearize(self, *_: Any) -> None:
        """None: compiled calls keep nothing for one another."""

    def curvature(
        self,
        k: int,
        theta: Tensor,
        direction: Gradient,
        support: Examples,
        requires: set[str],
        random: None,
    ) -> tuple[Tensor, Tensors]:
        ops, code, arena = self._call.ops, self._code(k), self._arena(theta)
        # Targets never require a gradient: the engine has no program for them.
        x_grad = support.x_name in requires
        product, mixed = ops.hvp(
            code,
            arena,
            self._frozen,
            support.x,
            support.y,
            joined(direction),
            x_grad,
            support.weight,
        )
        product, shared = self._by_kind(product, requires)
        return product, {**shared, support.x_name: mixed} if x_grad else shared

    def query(
        self, k: int, theta: Tensor, query: Examples, requires: set[str], weight: float
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensors]:
        ops, code, arena = self._call.ops, self._code(k), self._arena(theta)
        x_grad = query.x_name in requires
        losses, outputs, to_theta, to_x = ops.gradient(
            code, arena, self._frozen, query.x, query.y, x_grad, query.weight
        )
        to_theta, grads = self._by_kind(to_theta, requires)
        if x_grad:
            grads[query.x_name] = to_x
        if weight != 1:
            to_theta = weight * to_theta
            grads = {name: weight * grad for name, grad in grads.items()}
        return losses, self._call.shaped(outputs), to_theta if requires else None, grads

    def _arena(self, theta: Tensor) -> Tensor:
        """theta ``[T, A]`` with the shared parameters behind, as the ops take it."""
        if not self.outer:
            return theta
        return torch.cat((theta, self._tail.expand(*theta.shape[:-1], -1)), -1)

    def _by_kind(self, arena: Tensor, requires: set[str]) -> tuple[Tensor, Tensors]:
        """The adapted part of a gradient ``[T, P]``, and what of the shared part is required."""
        adapted, shared = self._call.program.by_kind(arena)
        named = {f"{SHARED}{name}": grads for name, grads in shared.items()}
        wanted = {name: grads.sum(0) for name, grads in named.items() if name in requires}
        return adapted.contiguous(), wanted

    def _code(self, k: int) -> Tensor:
        """The program's code at theta_k: norms of each step read their row k."""
        program = self._call.program
        return at_step(program.code, k) if program.per_step else program.code
