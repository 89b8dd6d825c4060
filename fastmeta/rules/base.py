"""Base of inner rules: an update of task arenas, and its vector-Jacobian product."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastmeta.core.autocast import without_autocast
from fastmeta.core.captured import captured_leaves
from fastmeta.core.checks import is_number
from fastmeta.core.derivatives import derivative
from fastmeta.core.dtypes import accumulation_dtype
from fastmeta.core.parameter_layout import ParameterLayout

Hyperparameter = float | nn.Parameter

State = tuple[Tensor, ...]

PREFIX = "rule."


class Step(NamedTuple):
    """Inputs of inner step k.

    ``theta`` and ``grads`` are ``[T, P]``; ``grads`` is the gradient of the support loss at theta.
    ``lr`` is ``[T or 1, P or 1]``, and ``state`` has tensors ``[T, P]``. Fields that a plain
    gradient step does not need for its derivative are None on the tape.
    """

    k: int
    theta: Tensor
    grads: Tensor
    lr: Tensor
    state: State = ()


class Pullback(NamedTuple):
    """Cotangents of an inner step's inputs.

    ``grads`` is None if it is not required. ``named`` has the required ones among ``lr`` and the
    rule's parameters, as ``rule.NAME``.
    """

    theta: Tensor
    grads: Tensor | None
    state: State
    named: dict[str, Tensor]


class Rule(nn.Module):
    """One inner step of every task, ``theta_{k+1}, state_{k+1} = U(theta_k, g_k, state_k; lr)``.

    A subclass writes ``update`` with differentiable operations. ``states`` is the number of tensors
    ``[T, P]`` that it passes from step to step; they start as zeros. Its ``nn.Parameter`` are
    learned hyperparameters. Autograd differentiates one update at a time.

    Example:
        >>> import torch
        >>> import fastmeta as fm
        >>> class SignDescent(fm.rules.Rule):
        ...     def update(self, theta, grads, lr, state, k):
        ...         return theta - lr * grads.sign(), state
        >>> maml = fm.MAML(torch.nn.Linear(3, 2), lr=0.1, rule=SignDescent())
        >>> x, y = torch.randn(4, 5, 3), torch.randint(0, 2, (4, 5))
        >>> maml.meta_loss(x, y, x, y)[0].backward()
    """

    @property
    def states(self) -> int:
        """Number of tensors ``[T, P]`` that pass from step to step."""
        return 0

    @property
    def is_plain(self) -> bool:
        """Whether it is ``theta - lr * grads``, which engines run without calling the rule."""
        return False

    @property
    def title(self) -> str:
        """The rule's name for reports."""
        return type(self).__name__

    def check(self, layout: ParameterLayout) -> None:
        """ValueError if the learned hyperparameters do not fit the arenas of a layout."""
        for name, parameter in self.named_parameters(recurse=False):
            if parameter.shape not in ((), (1,), (layout.numel,)):
                raise ValueError(
                    f"{name}: expected shape [], [1] or [P] with P = {layout.numel}, "
                    f"got {list(parameter.shape)}"
                )

    def update(
        self, theta: Tensor, grads: Tensor, lr: Tensor, state: State, k: int
    ) -> tuple[Tensor, State]:
        """Compute theta and the state after step k, differentiable in all of the tensors.

        Args:
            theta, grads: ``[T, P]``; half precision arrives as float32.
            lr: ``[T or 1, P or 1]``.
            state: ``states`` tensors ``[T, P]``.
            k: steps taken before.
        """
        raise NotImplementedError(f"{type(self).__name__} has no update")

    def start(self, theta: Tensor) -> State:
        """The state before the first step: zeros like ``theta``, in the precision of updates."""
        dtype = accumulation_dtype(theta.dtype)
        return tuple(torch.zeros_like(theta, dtype=dtype) for _ in range(self.states))

    def finish(self, state: State, steps: int) -> None:
        """Receive the state after the last of ``steps`` steps; most rules drop it."""

    def persist_state(self) -> AbstractContextManager[None]:
        """Context in which ``finish`` stores the state, for the next inner loop to start from."""
        return nullcontext()

    def step(self, at: Step) -> tuple[Tensor, State]:
        """Run ``update`` in the precision of updates; the new theta has the dtype of the old."""
        dtype = accumulation_dtype(at.theta.dtype)
        theta, grads = at.theta.to(dtype), at.grads.to(dtype)
        with without_autocast(theta.device):
            after, state = self.update(theta, grads, at.lr, at.state, at.k)
        return after.to(at.theta.dtype), state

    def vjp(self, at: Step, v: Tensor, state_v: State, requires: set[str]) -> Pullback:
        """The derivative of ``<theta_{k+1}, v> + <state_{k+1}, state_v>``.

        Args:
            at: inputs of the step.
            v: cotangent of theta_{k+1} ``[T, P]``.
            state_v: cotangents of the state.
            requires: names of the required derivatives, among ``"grads"``, ``"lr"`` and
                ``"rule.NAME"``.
        """
        theta, grads, lr, *state = (
            tensor.detach().requires_grad_() for tensor in (at.theta, at.grads, at.lr, *at.state)
        )
        named = {"grads": grads, "lr": lr}
        named.update((f"{PREFIX}{name}", p) for name, p in self.named_parameters())
        named = {name: tensor for name, tensor in named.items() if name in requires}
        with torch.enable_grad():
            after, new_state = self.step(Step(at.k, theta, grads, lr, tuple(state)))
        if at.k == 0:  # every step runs the same code
            self._refuse_captured([after, *new_state], [theta, grads, lr, *state])
        inputs = [theta, *state, *named.values()]
        # The backward pass stays out of autocast, as the update does.
        with without_autocast(theta.device):
            to_theta, *rest = derivative([after, *new_state], [v, *state_v], inputs)
        to_named = dict(zip(named, rest[len(state) :], strict=True))
        to_grads = to_named.pop("grads", None)
        return Pullback(to_theta, to_grads, tuple(rest[: len(state)]), to_named)

    def _refuse_captured(self, values: list[Tensor], inputs: list[Tensor]) -> None:
        """ValueError if a step depends on a tensor whose gradient would be lost."""
        known = [*inputs, *self.parameters()]
        for value in values:
            for leaf in captured_leaves(value, known):
                raise ValueError(
                    f"rule: {self.title} reads a tensor of shape {list(leaf.shape)} that requires "
                    "a gradient and is no parameter of the rule, so its gradient would be lost: "
                    "make it an nn.Parameter of the rule, or detach it"
                )


class RuleWrapper(Rule):
    """A rule that transforms the gradient before another rule takes the step.

    Args:
        rule: the rule that takes the step.
    """

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        if not isinstance(rule, Rule):
            raise TypeError(f"rule: expected a fastmeta.rules.Rule, got {type(rule).__name__}")
        self.rule = rule

    @property
    def states(self) -> int:
        return self.rule.states

    @property
    def title(self) -> str:
        return f"{type(self).__name__} before {self.rule.title}"

    def check(self, layout: ParameterLayout) -> None:
        super().check(layout)
        self.rule.check(layout)

    def start(self, theta: Tensor) -> State:
        own = super().start(theta)
        inner = self.rule.start(theta)
        return own[: len(own) - len(inner)] + inner

    def finish(self, state: State, steps: int) -> None:
        self.rule.finish(state[len(state) - self.rule.states :], steps)

    def persist_state(self) -> AbstractContextManager[None]:
        return self.rule.persist_state()

    def transform_gradient(self, grads: Tensor) -> Tensor:
        """The gradient for the rule inside, from the gradient ``[T, P]`` of the loss."""
        raise NotImplementedError(f"{type(self).__name__} has no transform_gradient")

    def update(
        self, theta: Tensor, grads: Tensor, lr: Tensor, state: State, k: int
    ) -> tuple[Tensor, State]:
        return self.rule.update(theta, self.transform_gradient(grads), lr, state, k)


def hyperparameter(
    name: str, value: Hyperparameter, least: float = 0.0, below: float = math.inf
) -> Hyperparameter:
    """The checked value: a number in ``[least, below)``, or a parameter of any value.

    Raises:
        TypeError: neither a number nor a floating-point ``nn.Parameter``.
        ValueError: a number out of range.
    """
    if isinstance(value, nn.Parameter):
        if not value.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point parameter, got {value.dtype}")
        return value
    if not is_number(value):
        kind = type(value).__name__
        raise TypeError(f"{name}: expected a number or an nn.Parameter, got {kind}")
    if not least <= value < below:
        raise ValueError(f"{name}: expected a number in [{least:g}, {below:g}), got {value}")
    return float(value)


def check_made_for(made_for: ParameterLayout, layout: ParameterLayout, rule: str) -> None:
    """ValueError if a rule with tensors for ``made_for`` is used with other parameters."""
    if (layout.names, layout.shapes) != (made_for.names, made_for.shapes):
        raise ValueError(
            f"rule: expected the trainable parameters that {rule} was made for, "
            f"{_shapes(made_for)}, got {_shapes(layout)}"
        )


def _shapes(layout: ParameterLayout) -> str:
    pairs = zip(layout.names, layout.shapes, strict=True)
    return ", ".join(f"{name} {list(shape)}" for name, shape in pairs)


def positive(name: str, value: Hyperparameter) -> Hyperparameter:
    """The checked value: a number above 0, or a parameter of any value.

    Raises:
        TypeError, ValueError: as ``hyperparameter``.
    """
    value = hyperparameter(name, value)
    if not isinstance(value, Tensor) and value == 0:
        raise ValueError(f"{name}: expected a number above 0, got {value:g}")
    return value


def decayed(grads: Tensor, theta: Tensor, weight_decay: Hyperparameter) -> Tensor:
    """The gradient of the loss plus ``weight_decay / 2 |theta|^2``."""
    if is_zero(weight_decay):
        return grads
    return grads + weight_decay * theta


def is_zero(value: Hyperparameter) -> bool:
    """Whether it is the number 0. A parameter is not: it may be learned."""
    return not isinstance(value, Tensor) and value == 0
