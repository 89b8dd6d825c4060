"""What an inner rule is: an update of task arenas, and its vector-Jacobian product."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastmeta.core.autocast import without_autocast
from fastmeta.core.derivatives import derivative
from fastmeta.core.dtypes import accumulation_dtype
from fastmeta.core.parameter_layout import ParameterLayout

Hyperparameter = float | nn.Parameter

State = tuple[Tensor, ...]

PREFIX = "rule."


class Step(NamedTuple):
    """Where inner step k starts.

    ``theta`` and ``grads`` are ``[T, P]``, the gradient being that of the support loss at theta;
    ``lr`` is ``[T or 1, P or 1]``; ``state`` holds tensors ``[T, P]``. A plain gradient step leaves
    out of a tape what its derivative does not need, and None stands there.
    """

    k: int
    theta: Tensor
    grads: Tensor
    lr: Tensor
    state: State = ()


class Pullback(NamedTuple):
    """What a rule's derivative carries back to theta, the gradient, the state and the named rest.

    ``grads`` is None where it is not wanted; ``named`` has ``lr`` and the rule's parameters, as
    ``rule.NAME``, as far as they are.
    """

    theta: Tensor
    grads: Tensor | None
    state: State
    named: dict[str, Tensor]


class Rule(nn.Module):
    """One inner step of every task, ``theta_{k+1}, state_{k+1} = U(theta_k, g_k, state_k; lr)``.

    A rule of your own writes ``update`` with differentiable operations, and says in ``states`` how
    many tensors ``[T, P]`` it carries from step to step; they start at zeros. Its ``nn.Parameter``
    are learned hyperparameters. The derivative is that of one update at a time, by autograd.

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
        """Number of tensors ``[T, P]`` that go from step to step."""
        return 0

    @property
    def is_plain(self) -> bool:
        """Whether it is ``theta - lr * grads``, which engines do without asking the rule."""
        return False

    @property
    def title(self) -> str:
        """The rule in words."""
        return type(self).__name__

    def check(self, layout: ParameterLayout) -> None:
        """Raise ValueError where the learned hyperparameters do not fit the arenas of a layout."""
        for name, parameter in self.named_parameters(recurse=False):
            if parameter.shape not in ((), (1,), (layout.numel,)):
                raise ValueError(
                    f"{name}: expected shape [], [1] or [P] with P = {layout.numel}, "
                    f"got {list(parameter.shape)}"
                )

    def update(
        self, theta: Tensor, grads: Tensor, lr: Tensor, state: State, k: int
    ) -> tuple[Tensor, State]:
        """theta and the state after step k, differentiable in all of the tensors.

        Args:
            theta, grads: ``[T, P]``; half precision comes as float32.
            lr: ``[T or 1, P or 1]``.
            state: ``states`` tensors ``[T, P]``.
            k: steps taken before.
        """
        raise NotImplementedError(f"{type(self).__name__} has no update")

    def start(self, theta: Tensor) -> State:
        """The state before the first step: zeros like ``theta``, of the precision of updates."""
        dtype = accumulation_dtype(theta.dtype)
        return tuple(torch.zeros_like(theta, dtype=dtype) for _ in range(self.states))

    def finish(self, state: State, steps: int) -> None:
        """Called with the state after the last of ``steps`` steps; most rules forget it."""

    def persist_state(self) -> AbstractContextManager[None]:
        """Inner loops that end within it are those that a rule with a memory remembers."""
        return nullcontext()

    def step(self, at: Step) -> tuple[Tensor, State]:
        """``update`` in the precision of updates; theta comes back in its own."""
        dtype = accumulation_dtype(at.theta.dtype)
        theta, grads = at.theta.to(dtype), at.grads.to(dtype)
        with without_autocast(theta.device):
            after, state = self.update(theta, grads, at.lr, at.state, at.k)
        return after.to(at.theta.dtype), state

    def vjp(self, at: Step, v: Tensor, state_v: State, wants: set[str]) -> Pullback:
        """The derivative of ``<theta_{k+1}, v> + <state_{k+1}, state_v>``.

        Args:
            at: where the step starts.
            v: ``[T, P]``.
            state_v: as the state.
            wants: of ``"grads"``, ``"lr"`` and ``"rule.NAME"``, those whose derivative is.
        """
        theta, grads, lr, *state = (
            tensor.detach().requires_grad_() for tensor in (at.theta, at.grads, at.lr, *at.state)
        )
        named = {"grads": grads, "lr": lr}
        named.update((f"{PREFIX}{name}", p) for name, p in self.named_parameters())
        named = {name: tensor for name, tensor in named.items() if name in wants}
        with torch.enable_grad():
            after, new_state = self.step(Step(at.k, theta, grads, lr, tuple(state)))
        inputs = [theta, *state, *named.values()]
        with without_autocast(theta.device):
            to_theta, *rest = derivative([after, *new_state], [v, *state_v], inputs)
        to_named = dict(zip(named, rest[len(state) :], strict=True))
        to_grads = to_named.pop("grads", None)
        return Pullback(to_theta, to_grads, tuple(rest[: len(state)]), to_named)


class RuleWrapper(Rule):
    """A rule that changes what another one sees of the gradient.

    Args:
        rule: what takes the step.
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
        """What the rule inside gets for the gradient ``[T, P]``."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it changes")

    def update(
        self, theta: Tensor, grads: Tensor, lr: Tensor, state: State, k: int
    ) -> tuple[Tensor, State]:
        return self.rule.update(theta, self.transform_gradient(grads), lr, state, k)


def hyperparameter(
    name: str, value: Hyperparameter, least: float = 0.0, below: float = math.inf
) -> Hyperparameter:
    """The value, checked: a number in ``[least, below)``, or a parameter, which may be anywhere.

    Raises:
        TypeError: neither a number nor a floating-point ``nn.Parameter``.
        ValueError: a number out of range.
    """
    if isinstance(value, nn.Parameter):
        if not value.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point parameter, got {value.dtype}")
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        kind = type(value).__name__
        raise TypeError(f"{name}: expected a number or an nn.Parameter, got {kind}")
    if not least <= value < below:
        raise ValueError(f"{name}: expected a number in [{least:g}, {below:g}), got {value}")
    return float(value)


def check_made_for(made_for: ParameterLayout, layout: ParameterLayout, rule: str) -> None:
    """Raise ValueError where a rule with tensors of its own meets other parameters than its."""
    if (layout.names, layout.shapes) != (made_for.names, made_for.shapes):
        raise ValueError(
            f"rule: {rule} was made for other trainable parameters than the model has; "
            f"expected {list(made_for.names)}, got {list(layout.names)}"
        )


def positive(name: str, value: Hyperparameter) -> Hyperparameter:
    """As ``hyperparameter``, and a number is above 0.

    Raises:
        TypeError, ValueError: as ``hyperparameter``.
    """
    value = hyperparameter(name, value)
    if not isinstance(value, Tensor) and value == 0:
        raise ValueError(f"{name}: expected a number above 0, got {value:g}")
    return value


def decayed(grads: Tensor, theta: Tensor, weight_decay: Hyperparameter) -> Tensor:
    """The gradient of the loss and of ``weight_decay / 2 |theta|^2``."""
    if is_zero(weight_decay):
        return grads
    return grads + weight_decay * theta


def is_zero(value: Hyperparameter) -> bool:
    """Whether it is the number 0; a parameter that is 0 now may not stay so."""
    return not isinstance(value, Tensor) and value == 0
