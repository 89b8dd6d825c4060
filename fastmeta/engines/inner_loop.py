"""K inner steps of many tasks without a graph, and the adjoint recursion back through them.

Symbols, as in the formulas of ``fastmeta.engines.adjoint``: theta the parameters ``[T, P]``, g_k
the gradient of the support loss at theta_k, v_k the adjoint, that is, the gradient of the meta-loss
to theta_k, and H_k the Hessian of the support loss at theta_k.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from fastmeta.core.derivatives import Tensors
from fastmeta.core.parameter_layout import ParameterLayout
from fastmeta.core.pieces import Gradient, Pieces, add_gradients, joined, may_stay_in_pieces
from fastmeta.core.random_state import RandomState
from fastmeta.core.step_sizes import StepSizes
from fastmeta.core.trees import Tree, concatenated
from fastmeta.engines.base import Examples, InnerLoopOptions
from fastmeta.rules.base import PREFIX, Rule, State, Step

SUPPORT = "support_"  # then x, y or weight, and a place in a tree
QUERY = "query_"
OUTER = "outer."  # then a number: tensors of ``InnerLoopOptions.outer``
SHARED = "shared."  # then a name: parameters that are learned and not adapted

# direction -> H_k direction, and the gradient of <g_k, direction> to the support.
Product = Callable[[Gradient], tuple[Gradient, Tensors]]

_LEFT_OUT = cast("Tensor", None)  # on the tape of a plain step, whose derivative does not read it


class Passes(Protocol):
    """Gradients, Hessian-vector products and query losses at parameters ``[T, P]``.

    An inner loop needs nothing else of a module. ``ModulePasses`` computes them by autograd,
    ``ProgramPasses`` by compiled calls. ``requires`` names the tensors that require a gradient;
    gradients of inputs are returned under the same names.
    """

    @property
    def layout(self) -> ParameterLayout:
        """The parameters in an arena ``[..., P]``."""
        ...

    @property
    def constants(self) -> Sequence[Tensor]:
        """Tensors that the passes read besides their arguments; the backward reads them again."""
        ...

    @property
    def outer(self) -> Tensors:
        """Tensors that the module or the loss reads by itself, which all tasks share.

        Named ``outer.0``, ``outer.1``, and ``shared.weight`` for a parameter that is not adapted.
        """
        ...

    def conditions(self) -> AbstractContextManager[None]:
        """The context in which all passes of one loop run."""
        ...

    def random_state(self, device: torch.device) -> RandomState | None:
        """Random state before the next gradient, for ``curvature`` to draw the same numbers."""
        ...

    def gradient(self, k: int, theta: Tensor, support: Examples) -> Gradient:
        """g_k ``[T, P]``, the gradient of the support loss at theta_k."""
        ...

    def linearize(
        self, k: int, theta: Tensor, support: Examples, requires: set[str]
    ) -> tuple[Gradient, Product] | None:
        """g_k, and ``curvature`` as a function of the direction, which keeps the activations.

        None if they are not kept: ``gradient`` and ``curvature`` compute them twice.
        """
        ...

    def curvature(
        self,
        k: int,
        theta: Tensor,
        direction: Gradient,
        support: Examples,
        requires: set[str],
        random: Any,
    ) -> tuple[Gradient, Tensors]:
        """``H_k direction`` ``[T, P]``, and the gradient of ``<g_k, direction>`` to the support."""
        ...

    def query(
        self, k: int, theta: Tensor, query: Examples, requires: set[str], weight: float
    ) -> tuple[Tensor, Tree, Gradient | None, Tensors]:
        """The query losses ``[T]`` at theta_k, the outputs, and the gradient of weighted losses.

        If anything is required, the gradient is to theta ``[T, P]`` and to the required tensors.
        """
        ...


class LoopInputs(NamedTuple):
    """The detached tensors that an inner loop starts from.

    Attributes:
        theta: starting parameters ``[P]`` for all tasks, or ``[T, P]``.
        step_sizes: the inner step sizes.
        support: the examples to adapt to.
        query: the examples to score; None if the loop only adapts.
    """

    theta: Tensor
    step_sizes: StepSizes
    support: Examples
    query: Examples | None = None

    def of_tasks(self, tasks: slice) -> LoopInputs:
        """The inputs of some tasks; tensors that all tasks share are not sliced."""
        return LoopInputs(
            of_tasks("theta", self.theta, tasks),
            self.step_sizes.of_tasks(tasks),
            self.support.of_tasks(tasks),
            None if self.query is None else self.query.of_tasks(tasks),
        )

    def named(self) -> Tensors:
        """The tensors by name; gradients have the same names."""
        named = {"theta": self.theta, "lr": self.step_sizes.values, **self.support.named()}
        return named if self.query is None else {**named, **self.query.named()}

    def rebuild(self) -> Callable[[Mapping[str, Tensor]], LoopInputs]:
        """The inverse of ``named``, which holds no tensor; it ignores other names."""
        support, query = self.support.form, None if self.query is None else self.query.form

        def of_named(named: Mapping[str, Tensor]) -> LoopInputs:
            theta, step_sizes = named["theta"], StepSizes(named["lr"])
            queries = None if query is None else query.of(named)
            return LoopInputs(theta, step_sizes, support.of(named), queries)

        return of_named


def of_tasks(name: str, tensor: Tensor, tasks: slice) -> Tensor:
    """The part of a named tensor, or of its gradient, that belongs to some tasks."""
    if name.startswith((PREFIX, OUTER, SHARED)):
        return tensor  # all tasks share it
    if name == "lr":
        return StepSizes(tensor).of_tasks(tasks).values
    return tensor if name == "theta" and tensor.ndim < 2 else tensor[tasks]


@dataclass
class Tape:
    """The record of K steps that the adjoint recursion reads.

    Attributes:
        thetas: theta_0 .. theta_{K-1} ``[T, P]``, for the second order and for the rule.
        grads: g_0 .. g_{K-1} ``[T, P]``, for the step sizes and for the rule.
        states: the rule's state before each step.
        randoms: step -> random state before it, for the second order, unless it is in products.
        products: step -> its ``curvature``, for steps whose activations are kept.
    """

    thetas: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    states: list[State] = field(default_factory=list)
    randoms: dict[int, RandomState | None] = field(default_factory=dict)
    products: dict[int, Product] = field(default_factory=dict)

    def at(self, k: int, step_sizes: Tensor) -> Step:
        """The inputs of step k."""
        theta, grads = (steps[k] if steps else _LEFT_OUT for steps in (self.thetas, self.grads))
        return Step(k, theta, grads, step_sizes, self.states[k] if self.states else ())


@dataclass(frozen=True)
class InnerLoop:
    """The inner loop of one call, its adjoint, and the query loss.

    ``requires`` names the tensors that require a gradient, among ``theta``, ``lr``, the tensors of
    support and queries, the rule's parameters, ``rule.NAME``, and the passes' ``outer`` tensors.

    Attributes:
        passes: the passes of the module or of its task program; perhaps on minibatches.
        options: steps, order and rule.
    """

    passes: Passes
    options: InnerLoopOptions

    @property
    def rule(self) -> Rule:
        """The inner update rule."""
        return self.options.inner_rule

    @property
    def rule_parameters(self) -> Tensors:
        """The rule's learned hyperparameters."""
        return {f"{PREFIX}{name}": p for name, p in self.rule.named_parameters()}

    def run(
        self,
        inputs: LoopInputs,
        requires: set[str],
        on_step: Callable[[int, Tensor], None] | None = None,
        may_keep: bool = False,
    ) -> tuple[Tensor, Tape]:
        """Take the K steps; returns theta_K ``[T, P]`` and the tape of the steps.

        ``on_step(k, theta_k)`` is called before each step, for k = 0 .. K - 1. ``may_keep``: the
        adjoint follows at once, so that activations of steps may be kept for it.
        """
        first_order, plain, tape = self.options.first_order, self.rule.is_plain, Tape()
        # A view without a copy: steps make new tensors and never write into theta_0.
        theta = inputs.theta.expand(inputs.support.tasks, self.passes.layout.numel)
        state = self.rule.start(theta)
        # The queries' gradients need no tape; in first order the support has none.
        untaped = (QUERY, SUPPORT) if first_order else QUERY
        taped = not all(name.startswith(untaped) for name in requires)
        with self.passes.conditions():
            for k in range(self.options.steps):
                if on_step is not None:
                    on_step(k, theta)
                kept = None
                if may_keep and taped and not first_order:
                    mixed = self._mixed(requires)
                    kept = self.passes.linearize(k, theta, inputs.support, mixed)
                if kept is not None:
                    grads, tape.products[k] = kept
                else:
                    # Before the gradient draws: the curvature pass replays its dropout masks.
                    if taped and not first_order:
                        tape.randoms[k] = self.passes.random_state(theta.device)
                    grads = self.passes.gradient(k, theta, inputs.support)
                is_taped = taped and (not plain or "lr" in requires)
                in_pieces = plain and not is_taped and may_stay_in_pieces(grads)
                grads = grads if in_pieces else joined(grads)
                # To first order a plain step is the identity in theta, so theta_k is not read.
                if taped and not (plain and first_order):
                    tape.thetas.append(theta)
                if is_taped:
                    tape.grads.append(cast("Tensor", grads))
                if taped and state:
                    tape.states.append(state)
                lr = inputs.step_sizes.at(k)
                if isinstance(grads, Pieces):
                    theta = grads.descend(theta, lr)
                else:
                    theta, state = self.rule.step(Step(k, theta, grads, lr, state))
        self.rule.finish(state, self.options.steps)
        return theta, tape

    def adjoint(
        self,
        tape: Tape,
        query_grads: dict[int, Gradient],
        inputs: LoopInputs,
        requires: set[str],
    ) -> tuple[Gradient, Tensors]:
        """Go back through the K steps by the adjoint recursion.

        Args:
            tape: the record of these steps.
            query_grads: for step k, the gradient ``[T, P]`` of the query loss evaluated at theta_k.
                Always has k = K; has k < K if step k's query loss has a weight.
            inputs, requires: as for ``run``.

        Returns:
            The gradient to theta ``[T, P]``; and name -> gradient: ``lr`` in the shape of the step
            sizes, and the required parameters of the rule, outer tensors and tensors of the
            support. First order has no gradient to the support, nor to an outer tensor by way of
            the inner steps.
        """
        named = {**inputs.named(), **self.rule_parameters, **self.passes.outer}
        mixed = self._mixed(requires)
        hyperparameters = requires.intersection({"lr", *self.rule_parameters})
        result = {name: torch.zeros_like(named[name]) for name in mixed | hyperparameters}
        # In first order v_{k+1} reaches theta_k directly, not through g_k.
        of_step = hyperparameters if self.options.first_order else {"grads", *hyperparameters}
        v = query_grads[self.options.steps]
        # Zeros: nothing differentiable reads the last state. Not the rule's own start, which may be
        # a remembered state.
        plain = self.rule.is_plain and not hyperparameters and may_stay_in_pieces(v)
        state_v = () if plain else Rule.start(self.rule, joined(v))
        with self.passes.conditions():
            for k in reversed(range(self.options.steps)):
                at = tape.at(k, inputs.step_sizes.at(k))
                if plain and isinstance(v, Pieces):
                    v = self._plain_adjoint(tape, at, v, inputs.support, mixed, result)
                    v = _sum_of(v, query_grads.get(k))
                    continue
                back = self.rule.vjp(at, joined(v), state_v, of_step)
                for name, tensor in back.named.items():
                    # Step sizes that all steps share have one row, in which the steps add up.
                    row = inputs.step_sizes.row(k)
                    target = result["lr"][row] if name == "lr" else result[name]
                    target += tensor  # in place: target is a view of the result
                state_v = back.state
                curved = self._curvature(tape, k, back.grads, inputs.support, mixed, result)
                v = _sum_of(back.theta, curved, query_grads.get(k))
        return v, result

    def _plain_adjoint(
        self,
        tape: Tape,
        at: Step,
        v: Pieces,
        support: Examples,
        mixed: set[str],
        result: Tensors,
    ) -> Gradient:
        """``v - H_k (lr v)`` of a plain step; adds the support's share to ``result``."""
        if self.options.first_order:
            return v
        # One step size for all of a task's parameters can wait for the product: a pass less.
        if at.lr.shape[-1] == 1 and not mixed:
            curved = self._curvature(tape, at.k, v, support, mixed, result)
            return v.minus(at.lr, cast("Pieces", curved))  # passes that give pieces always do
        direction = v.times(-at.lr)
        return _sum_of(v, self._curvature(tape, at.k, direction, support, mixed, result))

    def _reached(self, requires: set[str]) -> set[str]:
        """The required tensors that have a gradient; in first order the support has none."""
        unreached = SUPPORT if self.options.first_order else ()
        return {name for name in requires if not name.startswith(unreached)}

    def _mixed(self, requires: set[str]) -> set[str]:
        """The required tensors that H_k's mixed term reaches; in first order there is none."""
        if self.options.first_order:
            return set()
        outer = self.passes.outer
        return {name for name in requires if name.startswith(SUPPORT) or name in outer}

    def _curvature(
        self,
        tape: Tape,
        k: int,
        direction: Gradient | None,
        support: Examples,
        requires: set[str],
        result: Tensors,
    ) -> Gradient | None:
        """H_k times the gradient to g_k; adds the support's share to ``result``."""
        # A first-order step has no gradient to g_k: there is no product to take.
        if direction is None:
            return None
        if k in tape.products:
            product, mixed = tape.products.pop(k)(direction)  # its activations are freed
        else:
            product, mixed = self.passes.curvature(
                k, tape.thetas[k], direction, support, requires, tape.randoms[k]
            )
        for name, tensor in mixed.items():
            result[name] += tensor
        return product

    def meta_gradient(
        self, inputs: LoopInputs, requires: set[str], weights: Mapping[int, float]
    ) -> tuple[Tensor, Tree, Tensors]:
        """The meta-loss, the outputs on the queries, and the gradient of the meta-loss.

        Args:
            inputs, requires: as for ``run``.
            weights: k -> weight of the query loss at theta_k; has K, with 0 if need be.

        Returns:
            loss ``[]``, the outputs at theta_K, and name -> gradient in the shape of the tensor.
        """
        reached = self._reached(requires)
        shapes = {**inputs.named(), **self.rule_parameters, **self.passes.outer}
        result = {name: torch.zeros_like(shapes[name]) for name in reached}
        losses: list[Any] = []  # tensors, as the weights have K
        outputs: list[Tree] = []
        tasks = inputs.support.tasks
        for chunk in self.options.chunks(tasks):
            part = inputs.of_tasks(chunk)
            queries = _WeightedQueries(self.passes, cast("Examples", part.query), requires, weights)
            adapted, tape = self.run(part, requires, queries.add, may_keep=True)
            queries.add(self.options.steps, adapted)
            losses.append(queries.losses)
            outputs.append(queries.outputs)
            grads = queries.input_grads
            # A gradient of the queries only is complete without the adjoint.
            if not all(name.startswith(QUERY) for name in requires):
                to_theta, others = self.adjoint(tape, queries.theta_grads, part, requires)
                if "theta" in result:
                    _add(to_theta, of_tasks("theta", result["theta"], chunk))
                for name, grad in others.items():
                    # The query losses read the outer tensors too.
                    grads[name] = grad + grads[name] if name in grads else grad
            for name in result.keys() & grads.keys():
                # A view of the chunk's tasks, or all of a tensor that the chunks share.
                target = of_tasks(name, result[name], chunk)
                target += grads[name].sum_to_size(target.shape)
        means = {name: total.div_(tasks) for name, total in result.items()}
        return torch.cat(losses).mean(), concatenated(outputs), means


def _sum_of(first: Gradient, *others: Gradient | None) -> Gradient:
    for other in others:
        first = first if other is None else add_gradients(first, other)
    return first


def _add(gradient: Gradient, target: Tensor) -> None:
    """Add a gradient ``[T, P]`` to a target ``[T, P]``, or its sum over the tasks to ``[P]``."""
    if isinstance(gradient, Pieces):
        gradient.add_to(target)
    else:
        target += gradient.sum_to_size(target.shape)


@dataclass
class _WeightedQueries:
    """Weighted sum of a chunk's query losses, ``sum_k w_k L_q(theta_k)``, during the inner loop.

    The losses are taken in the forward loop, in which an unrolled loop draws its random numbers
    too. The adjoint reads their gradients from ``theta_grads``.

    Attributes:
        passes, query, requires, weights: as in ``InnerLoop.meta_gradient``, for the chunk.
        losses: the weighted sum ``[T]``.
        outputs: outputs on the queries at the last parameters added ``[T, Q, ...]``.
        theta_grads: k -> ``w_k grad L_q(theta_k)`` ``[T, P]``, if a gradient is required.
        input_grads: name -> gradient of the required query tensors.
    """

    passes: Passes
    query: Examples
    requires: set[str]
    weights: Mapping[int, float]
    losses: Tensor | None = None
    outputs: Tree = None
    theta_grads: dict[int, Gradient] = field(default_factory=dict)
    input_grads: Tensors = field(default_factory=dict)

    def add(self, k: int, theta: Tensor) -> None:
        """Add the query loss at theta_k, if it has a weight."""
        if k not in self.weights:
            return
        weight = self.weights[k]
        requires = self.requires if weight else set()
        losses, self.outputs, to_theta, grads = self.passes.query(
            k, theta, self.query, requires, weight
        )
        # A weight of 0 excludes the loss: 0 times an infinite loss would be NaN.
        weighted = weight * losses if weight else torch.zeros_like(losses)
        self.losses = weighted if self.losses is None else self.losses + weighted
        self.theta_grads[k] = torch.zeros_like(theta) if to_theta is None else to_theta
        for name, grad in grads.items():
            total = self.input_grads.get(name)
            self.input_grads[name] = grad if total is None else total + grad


@dataclass(frozen=True)
class Minibatches:
    """Passes whose inner steps each see a minibatch of the support.

    Attributes:
        passes: the passes on the complete support.
        indices: ``[K, B]``, the examples of each step.
    """

    passes: Passes
    indices: Tensor

    def __getattr__(self, name: str) -> Any:
        # Everything that does not read the support is the same for minibatches.
        return getattr(self.passes, name)

    def gradient(self, k: int, theta: Tensor, support: Examples) -> Gradient:
        return self.passes.gradient(k, theta, self._seen(k, support))

    def curvature(
        self,
        k: int,
        theta: Tensor,
        direction: Gradient,
        support: Examples,
        requires: set[str],
        random: Any,
    ) -> tuple[Gradient, Tensors]:
        seen = self._seen(k, support)
        product, mixed = self.passes.curvature(k, theta, direction, seen, requires, random)
        tensors = support.named()
        # Back to all examples; one that the step saw twice gets both of its gradients.
        for name in mixed.keys() & tensors.keys():
            complete = torch.zeros_like(tensors[name])
            mixed[name] = complete.index_add_(1, self.indices[k], mixed[name])
        return product, mixed

    def linearize(self, *_: Any) -> None:
        """None: minibatches are for ``adapt``, whose backward comes later."""

    def _seen(self, k: int, support: Examples) -> Examples:
        indices = self.indices[k]
        return support.map(lambda tensor: tensor[:, indices])
