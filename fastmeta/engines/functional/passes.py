"""The passes of a module that an inner loop is made of, by autograd and vmap."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmeta.core.derivatives import Tensors, Total, curvature, gradient
from fastmeta.core.inner_step import inner_step
from fastmeta.core.parameter_layout import ParameterLayout
from fastmeta.core.random_state import RandomState
from fastmeta.engines.base import QUERY, Loss
from fastmeta.engines.functional.task_module import TaskModule

# Activations that a reverse Hessian-vector product keeps, in those of a gradient: measured 2.9 on
# Conv4-64 and 2.8 on an MLP.
_HVP_ACTIVATIONS = 3


@dataclass(frozen=True)
class ModulePasses:
    """Gradients, products and query losses of any module, at parameters ``[T, P]``.

    Attributes:
        layout: of the arenas.
        call: the module.
        losses: the loss by role, ``"support"`` and ``"query"``.
        steps, first_order, hvp_mode: as in ``FunctionalEngine``.
    """

    layout: ParameterLayout
    call: TaskModule
    losses: dict[str, Loss]
    steps: int
    first_order: bool
    hvp_mode: str

    @property
    def constants(self) -> list[Tensor]:
        """What a pass reads besides its arguments; it must stay as it is until the way back."""
        return self.call.constants

    def conditions(self) -> AbstractContextManager[None]:
        """What passes run in, all of a loop's together."""
        return self.call.conditions()

    def random_state(self, device: torch.device) -> RandomState:
        """What the next gradient draws, for ``curvature`` to draw it again."""
        return RandomState(device)

    def gradient(self, k: int, theta: Tensor, data: Tensors) -> Tensor:
        """g_k ``[T, P]``, that of the support loss at theta_k."""
        with inner_step(k):
            grads, _ = gradient(self._total("support", data), self.layout.views(theta), {})
        return self.layout.flatten(grads)

    def curvature(
        self,
        k: int,
        theta: Tensor,
        direction: Tensor,
        data: Tensors,
        inputs: Tensors,
        random: RandomState,
    ) -> tuple[Tensor, Tensors]:
        """``H_k direction`` ``[T, P]``, and the derivative of ``<g_k, direction>`` to the inputs.

        Args:
            k, theta, data: as for ``gradient``.
            direction: ``[T, P]``.
            inputs: those of the support whose derivative is wanted.
            random: of the gradient at theta_k.
        """
        total = self._total("support", data)
        params, along = self.layout.views(theta), self.layout.views(direction)
        with random.replay(), inner_step(k):
            product, mixed = curvature(total, params, along, inputs, self.hvp_mode)
        return self.layout.flatten(product), mixed

    def query(
        self, k: int, theta: Tensor, data: Tensors, wants: set[str], weight: float
    ) -> tuple[Tensor, Tensor, Tensors]:
        """The query losses at theta_k, the outputs, and the gradient of ``weight`` times their sum.

        Tasks go in groups that keep no more activations than a Hessian-vector product on the
        support does, so that a large query set does not set the peak of the memory.

        Returns:
            losses ``[T]``, outputs ``[T, Q, ...]``, and name -> gradient, if any is wanted: of
            ``theta`` ``[T, P]`` and of the wanted query tensors.
        """
        losses: list[Tensor] = []
        outputs: list[Tensor] = []
        grads: list[Tensors] = []
        with self.conditions(), inner_step(k):
            for rows in self._query_groups(data):
                part = {name: data[name][rows] for name in QUERY}
                total = self._total("query", part, (losses, outputs), weight)
                params = self.layout.views(theta[rows])
                if wants:
                    inputs = {name: part[name] for name in QUERY if name in wants}
                    to_params, to_inputs = gradient(total, params, inputs)
                    grads.append({**to_inputs, "theta": self.layout.flatten(to_params)})
                else:
                    total(params, {})
        names = grads[0] if grads else ()
        joined = {name: torch.cat([part[name] for part in grads]) for name in names}
        return torch.cat(losses), torch.cat(outputs), joined

    def _total(
        self,
        role: str,
        data: Tensors,
        kept: tuple[list[Tensor], list[Tensor]] | None = None,
        weight: float = 1.0,
    ) -> Total:
        """The summed loss as a function of parameters and of the inputs that replace ``data``."""

        def total(params: Tensors, inputs: Tensors) -> Tensor:
            x, y = (inputs.get(name, data[name]) for name in (f"{role}_x", f"{role}_y"))
            losses, outputs = self.call.losses(params, x, y, self.losses[role])
            if kept is not None:
                kept[0].append(losses.detach())
                kept[1].append(outputs.detach())
            return losses.sum() if weight == 1 else weight * losses.sum()

        return total

    def _query_groups(self, data: Tensors) -> Iterator[slice]:
        tasks, queries = data["query_x"].shape[:2]
        size = tasks
        if self.steps > 0 and "support_x" in data:
            passes = 1 if self.first_order else _HVP_ACTIVATIONS
            size = max(1, passes * tasks * data["support_x"].shape[1] // queries)
        return (slice(start, start + size) for start in range(0, tasks, size))
