"""Gradients, curvature and query losses of any module, by autograd and vmap."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmeta.core.derivatives import Linearized, Tensors, Total, curvature, gradient
from fastmeta.core.inner_step import inner_step
from fastmeta.core.parameter_layout import ParameterLayout
from fastmeta.core.parameter_selection import shared_parameters
from fastmeta.core.pieces import Gradient, Pieces
from fastmeta.core.random_state import RandomState
from fastmeta.core.trees import Tree, concatenated, map_tensors
from fastmeta.engines.base import Examples, InnerLoopOptions, Loss
from fastmeta.engines.functional.captured import CapturedNames, would_lose_gradients
from fastmeta.engines.functional.label_checks import with_checked_labels
from fastmeta.engines.functional.task_module import TaskModule
from fastmeta.engines.inner_loop import OUTER, SHARED
from fastmeta.engines.tape import Product

# Activations that a reverse Hessian-vector product keeps, as a multiple of the activations that a
# gradient keeps: measured 2.9 on Conv4-64 and 2.8 on an MLP.
_HVP_ACTIVATIONS = 3


@dataclass(frozen=True)
class ModulePasses:
    """Gradients, products and query losses of any module, at parameters ``[T, P]``.

    The methods are documented in ``fastmeta.engines.inner_loop.Passes``.

    Attributes:
        layout: the layout of the arenas.
        task_module: the module as a function of the tasks' parameters.
        support_loss, query_loss: the loss, with the labels of this batch checked.
        hvp_mode: as in ``InnerLoopOptions``.
        query_limit: query examples of each task that one pass over all tasks may take; None: any
            number.
        outer: as in ``Passes``.
        kept_from: the first step whose activations are kept for the adjoint.
        refuse: raises for a tensor that the loss reads and that is no input of the loop.
    """

    layout: ParameterLayout
    task_module: TaskModule
    support_loss: Loss
    query_loss: Loss
    hvp_mode: str
    query_limit: int | None
    outer: Tensors
    kept_from: int
    refuse: Callable[[Tensor, list[Tensor]], None] | None

    @classmethod
    def of(
        cls,
        layout: ParameterLayout,
        task_module: TaskModule,
        loss: Loss,
        options: InnerLoopOptions,
        support: Examples | None,
        query: Examples | None,
    ) -> ModulePasses:
        """The passes for a batch; checks its labels, once."""
        inner_loss = loss if options.inner_loss is None else options.inner_loss
        # Without a support the queries are what a step is measured on.
        sets = (inner_loss, query if support is None else support), (loss, query)
        support_loss, query_loss = (
            own if examples is None else with_checked_labels(own, examples.y, examples.y_name)
            for own, examples in sets
        )
        query_limit = None
        if support is not None and options.steps > 0:
            # As many activations as the support's Hessian-vector product keeps: a larger query set
            # then runs in groups and does not raise the peak of the memory.
            query_limit = support.size * (1 if options.first_order else _HVP_ACTIVATIONS)
        shared = shared_parameters(task_module.module, options.adapt)
        outer: Tensors = {
            **{f"{OUTER}{i}": tensor for i, tensor in enumerate(options.outer)},
            **{f"{SHARED}{name}": parameter for name, parameter in shared.items()},
        }
        names = CapturedNames(task_module.module, (loss, inner_loss))
        return cls(
            outer=outer,
            refuse=names.refuse_captured if would_lose_gradients() else None,
            layout=layout,
            task_module=task_module,
            support_loss=support_loss,
            query_loss=query_loss,
            hvp_mode=options.hvp_mode,
            query_limit=query_limit,
            kept_from=options.steps,
        )

    @property
    def constants(self) -> list[Tensor]:
        return self.task_module.constants

    def conditions(self) -> AbstractContextManager[None]:
        return self.task_module.conditions()

    def random_state(self, device: torch.device) -> RandomState:
        return RandomState(device)

    def gradient(self, k: int, theta: Tensor, support: Examples) -> Pieces:
        total = self._total(support, self.support_loss)
        check = self._check if k == 0 else None  # every step runs the same code
        with inner_step(k):
            grads, _ = gradient(total, self.layout.views(theta), {}, check=check)
        return Pieces(self.layout, grads)

    def linearize(
        self, k: int, theta: Tensor, support: Examples, requires: set[str]
    ) -> tuple[Pieces, Product] | None:
        if k < self.kept_from:
            return None
        total = self._total(support, self.support_loss)
        inputs, captured = _required(support, requires), self._outer(requires)
        check = self._check if k == 0 else None
        with inner_step(k):
            linear = Linearized.of(total, self.layout.views(theta), inputs, captured, check)

        def product(direction: Gradient) -> tuple[Pieces, Tensors]:
            along, mixed = linear.product(self._tensors(direction))
            return Pieces(self.layout, along), mixed

        detached = {name: grad.detach() for name, grad in linear.grads.items()}
        return Pieces(self.layout, detached), product

    def curvature(
        self,
        k: int,
        theta: Tensor,
        direction: Gradient,
        support: Examples,
        requires: set[str],
        random: RandomState,
    ) -> tuple[Pieces, Tensors]:
        total = self._total(support, self.support_loss)
        params, along = self.layout.views(theta), self._tensors(direction)
        inputs, captured = _required(support, requires), self._outer(requires)
        # The Hessian belongs to the function that step k saw, so to the same dropout masks.
        with random.replay(), inner_step(k):
            product, mixed = curvature(total, params, along, inputs, self.hvp_mode, captured)
        return Pieces(self.layout, product), mixed

    def query(
        self, k: int, theta: Tensor, query: Examples, requires: set[str], weight: float
    ) -> tuple[Tensor, Tree, Gradient | None, Tensors]:
        losses: list[Tensor] = []
        outputs: list[Tree] = []
        to_theta: list[Tensors] = []
        grads: list[Tensors] = []
        with self.conditions(), inner_step(k):
            for group in self._query_groups(query):
                part = query.of_tasks(group)
                total = self._total(part, self.query_loss, weight, (losses, outputs))
                params = self.layout.views(theta[group])
                if requires:
                    inputs, captured = _required(part, requires), self._outer(requires)
                    to_params, others = gradient(total, params, inputs, captured, self._check)
                    to_theta.append(to_params)
                    grads.append(others)
                else:
                    total(params, {})  # records the losses and the outputs
        joined = {
            # The groups share the outer tensors, and each has its own tasks of the others.
            name: torch.stack(parts).sum(0) if name in self.outer else torch.cat(parts)
            for name in (grads[0] if grads else ())
            for parts in [[group[name] for group in grads]]
        }
        found = Pieces(self.layout, _of_all_groups(to_theta)) if requires else None
        return torch.cat(losses), concatenated(outputs), found, joined

    def _tensors(self, gradient: Gradient) -> Tensors:
        if isinstance(gradient, Pieces):
            return dict(gradient.tensors)
        return self.layout.views(gradient)

    def _outer(self, requires: set[str]) -> Tensors:
        return {name: tensor for name, tensor in self.outer.items() if name in requires}

    def _check(self, value: Tensor, sources: list[Tensor]) -> None:
        if self.refuse is not None:
            self.refuse(value, [*sources, *self.outer.values()])

    def _total(
        self,
        examples: Examples,
        loss: Loss,
        weight: float = 1.0,
        record: tuple[list[Tensor], list[Tree]] | None = None,
    ) -> Total:
        """The summed loss as a function of parameters, and of inputs that replace the examples.

        Each call appends its losses and outputs to ``record``.
        """

        def total(params: Tensors, inputs: Tensors) -> Tensor:
            losses, outputs = self.task_module.losses(params, examples.replaced(inputs), loss)
            if record is not None:
                record[0].append(losses.detach())
                record[1].append(map_tensors(Tensor.detach, outputs))
            # The sum: tasks do not mix, so its gradient is the gradient of every task.
            return losses.sum() if weight == 1 else weight * losses.sum()

        return total

    def _query_groups(self, query: Examples) -> list[slice]:
        size = tasks = query.tasks
        if self.query_limit is not None:
            size = max(1, tasks * self.query_limit // query.size)
        return [slice(start, start + size) for start in range(0, tasks, size)]


def _of_all_groups(parts: list[Tensors]) -> Tensors:
    """Join the tensors of groups of tasks."""
    if len(parts) == 1:
        return parts[0]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _required(examples: Examples, requires: set[str]) -> Tensors:
    return {name: tensor for name, tensor in examples.named().items() if name in requires}
