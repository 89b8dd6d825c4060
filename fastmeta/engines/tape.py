"""The record of the inner steps from which the adjoint recursion goes back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

from torch import Tensor

from fastmeta.core.derivatives import Tensors
from fastmeta.core.pieces import Gradient
from fastmeta.core.random_state import RandomState
from fastmeta.rules.base import State, Step

# direction -> H_k direction, and the gradient of <g_k, direction> to the support.
Product = Callable[[Gradient], tuple[Gradient, Tensors]]

LEFT_OUT = cast("Tensor", None)  # a tensor that the step, or its derivative, does not read


@dataclass
class Tape:
    """The record, by step, of K steps that the adjoint recursion reads.

    Attributes:
        thetas: theta_k ``[T, P]``, for the second order and for the rule.
        grads: g_k ``[T, P]``, for the step sizes and for the rule.
        states: the rule's state before a step.
        randoms: random state before a step, for the second order, unless it is in products.
        products: a step's ``curvature``, for steps whose activations are kept.
        complete_from: the first of the steps whose record is complete, see ``Segments``.
    """

    thetas: dict[int, Tensor] = field(default_factory=dict)
    grads: dict[int, Tensor] = field(default_factory=dict)
    states: dict[int, State] = field(default_factory=dict)
    randoms: dict[int, RandomState | None] = field(default_factory=dict)
    products: dict[int, Product] = field(default_factory=dict)
    complete_from: int = 0

    def at(self, k: int, step_sizes: Tensor) -> Step:
        """The inputs of step k."""
        theta, grads = (steps.get(k, LEFT_OUT) for steps in (self.thetas, self.grads))
        return Step(k, theta, grads, step_sizes, self.states.get(k, ()))

    def drop(self, k: int) -> None:
        """Free what is recorded of step k."""
        for record in (self.thetas, self.grads, self.states, self.randoms):
            record.pop(k, None)
