"""K inner steps of many tasks without a graph, and the adjoint recursion back through them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from fastmeta.core.derivatives import Tensors
from fastmeta.core.parameter_layout import ParameterLayout
from fastmeta.core.random_state import RandomState
from fastmeta.engines.base import QUERY, SUPPORT
from fastmeta.rules.base import PREFIX, Pullback, Rule, State, Step

_LEFT_OUT = cast("Tensor", None)  # for a plain step, whose derivative does not look at it


class Passes(Protocol):
    """Gradients, Hessian-vector products and query losses at parameters ``[T, P]``.

    An inner loop needs nothing else of a module. ``ModulePasses`` takes them by autograd,
    ``ProgramPasses`` by compiled calls.
    """

    @property
    def layout(self) -> ParameterLayout: ...

    @property
    def constants(self) -> Sequence[Tensor]: ...

    def conditions(self) -> AbstractContextManager[None]: ...

    def random_state(self, device: torch.device) -> RandomState | None: ...

    def gradient(self, k: int, theta: Tensor, data: Tensors) -> Tensor: ...

    def curvature(
        self, k: int, theta: Tensor, direction: Tensor, data: Tensors, inputs: Tensors, random: Any
    ) -> tuple[Tensor, Tensors]: ...

    def query(
        self, k: int, theta: Tensor, data: Tensors, wants: set[str], weight: float
    ) -> tuple[Tensor, Tensor, Tensors]: ...


@dataclass
class Tape:
    """What K steps leave behind for the way back.

    Attributes:
        thetas: theta_0 .. theta_{K-1} ``[T, P]``, for the second order and for the rule.
        grads: g_0 .. g_{K-1} ``[T, P]``, for the step sizes and for the rule.
        states: the rule's before each step.
        randoms: the generators before each step, for the second order.
    """

    thetas: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    states: list[State] = field(default_factory=list)
    randoms: list[RandomState | None] = field(default_factory=list)

    def at(self, k: int, lr: Tensor) -> Step:
        """Where step k started."""
        theta, grads = (steps[k] if steps else _LEFT_OUT for steps in (self.thetas, self.grads))
        return Step(k, theta, grads, lr, self.states[k] if self.states else ())


@dataclass(frozen=True)
class InnerLoop:
    """The inner loop of the tasks of one call, its adjoint, and the query loss.

    ``wants`` names the tensors whose gradient is asked for, among ``theta``, ``lr``, ``support_x``,
    ``support_y``, ``query_x``, ``query_y`` and the rule's parameters, ``rule.NAME``. ``step`` holds
    the step sizes as ``[K or 1, T or 1, P or 1]``. All tensors come detached.

    Attributes:
        passes: of the module, or of its task program; perhaps on minibatches.
        steps, first_order: as in ``FunctionalEngine``.
        rule: what takes the steps.
    """

    passes: Passes
    steps: int
    first_order: bool
    rule: Rule

    @property
    def rule_parameters(self) -> Tensors:
        """The rule's learned hyperparameters."""
        return {f"{PREFIX}{name}": p for name, p in self.rule.named_parameters()}

    def run(
        self,
        theta: Tensor,
        step: Tensor,
        data: Tensors,
        wants: set[str],
        visit: Callable[[int, Tensor], None] | None = None,
    ) -> tuple[Tensor, Tape]:
        """theta_K ``[T, P]``, K steps from ``theta`` ``[P]`` or ``[T, P]``, and their tape.

        ``visit(k, theta_k)`` is called on the way, for k = 0 .. K - 1.
        """
        tape, plain = Tape(), self.rule.is_plain
        theta = theta.expand(len(data["support_x"]), self.passes.layout.numel)
        state = self.rule.start(theta)
        goes_back = bool(wants.difference(QUERY, SUPPORT if self.first_order else ()))
        with self.passes.conditions():
            for k in range(self.steps):
                if visit is not None:
                    visit(k, theta)
                if goes_back and not self.first_order:
                    tape.randoms.append(self.passes.random_state(theta.device))
                grads = self.passes.gradient(k, theta, data)
                if goes_back and not (plain and self.first_order):
                    tape.thetas.append(theta)
                if goes_back and (not plain or "lr" in wants):
                    tape.grads.append(grads)
                if goes_back and state:
                    tape.states.append(state)
                theta, state = self.rule.step(Step(k, theta, grads, step[_row(step, k)], state))
        self.rule.finish(state, self.steps)
        return theta, tape

    def adjoint(
        self, tape: Tape, pulls: dict[int, Tensor], step: Tensor, data: Tensors, wants: set[str]
    ) -> Tensors:
        """The gradient before the K steps.

        Args:
            tape: of these steps.
            pulls: k -> the gradient ``[T, P]`` of what reads theta_k besides the next step: always
                for k = K, and for each k < K that has a query loss of its own.
            step, data, wants: as for ``run``.

        Returns:
            name -> gradient: ``theta`` ``[T, P]``; ``lr`` in the shape of ``step``; the rule's
            parameters and the support as they are, the latter not in first order.
        """
        inputs = {} if self.first_order else {n: data[n] for n in SUPPORT if n in wants}
        named = {n: p for n, p in {"lr": step, **self.rule_parameters}.items() if n in wants}
        result = {name: torch.zeros_like(t) for name, t in (inputs | named).items()}
        asked = set(named) if self.first_order else {"grads", *named}
        v = pulls[self.steps]
        state_v = Rule.start(self.rule, v)  # zeros: nothing differentiable reads the last state
        with self.passes.conditions():
            for k in reversed(range(self.steps)):
                row = _row(step, k)
                back = self.rule.vjp(tape.at(k, step[row]), v, state_v, asked)
                for name, tensor in back.named.items():
                    target = result["lr"][row] if name == "lr" else result[name]
                    target += tensor
                v, state_v = back.theta, back.state
                for pull in (self._curved(tape, k, back, data, inputs, result), pulls.get(k)):
                    v = v if pull is None else v + pull
        return {**result, "theta": v}

    def _curved(
        self, tape: Tape, k: int, back: Pullback, data: Tensors, inputs: Tensors, result: Tensors
    ) -> Tensor | None:
        """H_k times what goes back to g_k, whose share in the inputs is added to the result."""
        if back.grads is None:
            return None
        random: Any = tape.randoms[k]
        at = k, tape.thetas[k], back.grads
        product, mixed = self.passes.curvature(*at, data, inputs, random)
        for name, tensor in mixed.items():
            result[name] += tensor
        return product

    def meta_gradient(
        self,
        theta: Tensor,
        step: Tensor,
        data: Tensors,
        wants: set[str],
        chunks: Sequence[slice],
        weights: Mapping[int, float],
    ) -> tuple[Tensor, Tensor, Tensors]:
        """The meta-loss, the outputs on the queries, and the gradient of the meta-loss.

        Args:
            theta, step, data, wants: as for ``run``.
            chunks: the tasks that run together.
            weights: k -> weight of the query loss at theta_k; K is among them, with 0 if need be.

        Returns:
            loss ``[]``, outputs at theta_K ``[T, Q, ...]``, and name -> gradient in the shape of
            the tensor.
        """
        sources = {"theta": theta, "lr": step, **data}
        unreached = SUPPORT if self.first_order else ()
        shapes = {**sources, **self.rule_parameters}
        result = {n: torch.zeros_like(shapes[n]) for n in wants if n not in unreached}
        losses: list[Any] = []  # tensors, as the weights have K
        outputs: list[Any] = []
        for rows in chunks:
            part = {name: take_tasks(name, tensor, rows) for name, tensor in sources.items()}
            queries = _WeightedQueries(self, part, wants, weights)
            adapted, tape = self.run(part["theta"], part["lr"], part, wants, queries.visit)
            queries.visit(self.steps, adapted)
            losses.append(queries.losses)
            outputs.append(queries.outputs)
            grads = queries.grads
            if wants.difference(QUERY):
                grads.update(self.adjoint(tape, queries.pulls, part["lr"], part, wants))
            for name in result.keys() & grads.keys():
                target = take_tasks(name, result[name], rows)
                target += grads[name].sum_to_size(target.shape)
        tasks = len(data["query_x"])
        means = {name: total.div_(tasks) for name, total in result.items()}
        return torch.cat(losses).mean(), torch.cat(outputs), means


@dataclass
class _WeightedQueries:
    """The query losses of a chunk, ``sum_k w_k L_q(theta_k)``, gathered as the inner loop goes on.

    They are taken on the way there, in the order in which an unrolled loop would draw its random
    numbers; the way back finds their gradients in ``pulls``.

    Attributes:
        loop, data, wants, weights: as in ``InnerLoop.meta_gradient``, of the chunk.
        losses: their weighted sum ``[T]``.
        outputs: those of the last visit ``[T, Q, ...]``.
        pulls: k -> ``w_k grad L_q(theta_k)`` ``[T, P]``, if a gradient is wanted.
        grads: name -> gradient of the wanted query tensors.
    """

    loop: InnerLoop
    data: Tensors
    wants: set[str]
    weights: Mapping[int, float]
    losses: Tensor | None = None
    outputs: Tensor | None = None
    pulls: dict[int, Tensor] = field(default_factory=dict)
    grads: Tensors = field(default_factory=dict)

    def visit(self, k: int, theta: Tensor) -> None:
        """Adds the query loss at theta_k, if it has a weight."""
        if k not in self.weights:
            return
        weight = self.weights[k]
        wants = self.wants if weight else set()
        losses, self.outputs, grads = self.loop.passes.query(k, theta, self.data, wants, weight)
        # A weight of 0 means not asked for: 0 times an infinite loss would be NaN.
        weighted = weight * losses if weight else torch.zeros_like(losses)
        self.losses = weighted if self.losses is None else self.losses + weighted
        self.pulls[k] = grads.pop("theta") if wants else torch.zeros_like(theta)
        for name, grad in grads.items():
            self.grads[name] = self.grads[name] + grad if name in self.grads else grad


def _row(step: Tensor, k: int) -> int:
    """The row of step k: its own, or the one that all steps share."""
    return k % len(step)


def take_tasks(name: str, tensor: Tensor, rows: slice) -> Tensor:
    """A chunk of the tasks' rows; what tasks share stays whole."""
    if name.startswith(PREFIX):
        return tensor
    if name == "lr":
        return tensor if tensor.shape[1] == 1 else tensor[:, rows]
    return tensor if name == "theta" and tensor.ndim < 2 else tensor[rows]


@dataclass(frozen=True)
class Minibatches:
    """Passes whose inner steps each see some of the support's examples.

    Attributes:
        passes: of all of them.
        rows: ``[K, B]``, the examples of each step.
    """

    passes: Passes
    rows: Tensor

    def __getattr__(self, name: str) -> Any:
        return getattr(self.passes, name)

    def gradient(self, k: int, theta: Tensor, data: Tensors) -> Tensor:
        return self.passes.gradient(k, theta, self._seen(k, data))

    def curvature(
        self, k: int, theta: Tensor, direction: Tensor, data: Tensors, inputs: Tensors, random: Any
    ) -> tuple[Tensor, Tensors]:
        at = k, theta, direction, self._seen(k, data), self._seen(k, inputs)
        product, mixed = self.passes.curvature(*at, random)
        whole = {
            name: torch.zeros_like(inputs[name]).index_add_(1, self.rows[k], part)
            for name, part in mixed.items()
        }
        return product, whole

    def _seen(self, k: int, data: Tensors) -> Tensors:
        return {
            name: tensor[:, self.rows[k]] if name in SUPPORT else tensor
            for name, tensor in data.items()
        }
