"""K inner steps of many tasks without a graph, and the adjoint recursion back through them.

Symbols, as in the formulas of ``fastmeta.engines.adjoint``: theta the parameters ``[T, P]``, g_k
the gradient of the support loss at theta_k, v_k the adjoint, that is, the gradient of the meta-loss
to theta_k, and H_k the Hessian of the support loss at theta_k.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from fastmeta.core.derivatives import Tensors
from fastmeta.core.parameter_layout import ParameterLayout
from fastmeta.core.pieces import Gradient, Pieces, add_gradients, joined, may_stay_in_pieces
from fastmeta.core.random_state import RandomState
from fastmeta.core.step_sizes import StepSizes
from fastmeta.core.trees import Tree, concatenated
from fastmeta.engines.base import Examples, InnerLoopOptions, Minibatches
from fastmeta.engines.segments import Segments
from fastmeta.engines.tape import LEFT_OUT, Product, Tape
from fastmeta.rules.base import PREFIX, Rule, State, Step

SUPPORT = "support_"  # then x, y or weight, and a place in a tree
QUERY = "query_"
OUTER = "outer."  # then a number: tensors of ``InnerLoopOptions.outer``
SHARED = "shared."  # then a name: parameters that are learned and not adapted


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


@dataclass(frozen=True)
class InnerLoop:
    """The inner loop of one call, its adjoint, and the query loss.

    ``requires`` names the tensors that require a gradient, among ``theta``, ``lr``, the tensors of
    support and queries, the rule's parameters, ``rule.NAME``, and the passes' ``outer`` tensors.

    Attributes:
        passes: the passes of the module or of its task program.
        options: steps, order and rule.
        batches: the examples that each step sees; None: the complete support.
    """

    passes: Passes
    options: InnerLoopOptions
    batches: Minibatches | None = None

    @property
    def rule(self) -> Rule:
        """The inner update rule."""
        return self.options.inner_rule

    @property
    def rule_parameters(self) -> Tensors:
        """The rule's learned hyperparameters."""
        return {f"{PREFIX}{name}": p for name, p in self.rule.named_parameters()}

    @property
    def constants(self) -> list[Tensor]:
        """Tensors that the loop reads besides its inputs; the backward reads them again."""
        indices = None if self.batches is None else self.batches.indices
        return [*self.passes.constants, *(() if indices is None else (indices,))]

    def of_tasks(self, tasks: slice) -> InnerLoop:
        """The loop of some of the tasks."""
        return self if self.batches is None else replace(self, batches=self.batches.of_tasks(tasks))

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
        first_order = self.options.first_order
        # A view without a copy: steps make new tensors and never write into theta_0.
        theta = inputs.theta.expand(inputs.support.tasks, self.passes.layout.numel)
        state = self.rule.start(theta)
        # The queries' gradients need no tape; in first order the support has none.
        untaped = (QUERY, SUPPORT) if first_order else QUERY
        taped = not all(name.startswith(untaped) for name in requires)
        tape = Tape()
        # The derivative of a plain step of first order reads nothing of the step.
        reads = taped and (self.reads_gradients(requires) or not first_order)
        segments = Segments.of(self.options) if reads else None
        if segments is not None:
            tape.complete_from = segments.complete_from(may_keep)
        with self.passes.conditions():
            for k in range(self.options.steps):
                if on_step is not None:
                    on_step(k, theta)
                at = Step(k, theta, LEFT_OUT, inputs.step_sizes.at(k), state)
                if segments is not None and k < tape.complete_from:
                    segments.keep(tape, at, self.passes.random_state(theta.device))
                into = tape if taped and k >= tape.complete_from else None
                theta, state = self._take(at, inputs.support, requires, into, may_keep)
        self.rule.finish(state, self.options.steps)
        return theta, tape

    def _take(
        self,
        at: Step,
        support: Examples,
        requires: set[str],
        tape: Tape | None,
        may_keep: bool = False,
    ) -> tuple[Tensor, State]:
        """Take a step from ``at``, whose gradient is not read, and record it on the tape."""
        k, theta, first_order = at.k, at.theta, self.options.first_order
        plain, seen, kept = self.rule.is_plain, self._seen(k, support), None
        if may_keep and tape is not None and not first_order:
            kept = self.passes.linearize(k, theta, seen, self._mixed(requires))
        if kept is not None:
            grads, cast("Tape", tape).products[k] = kept
        else:
            # Before the gradient draws: the curvature pass replays its dropout masks.
            if tape is not None and not first_order:
                tape.randoms[k] = self.passes.random_state(theta.device)
            grads = self.passes.gradient(k, theta, seen)
        reads = self.reads_gradients(requires)
        in_pieces = not reads and may_stay_in_pieces(grads)
        grads = grads if in_pieces else joined(grads)
        if tape is not None:
            # To first order a plain step is the identity in theta, so theta_k is not read.
            if not (plain and first_order):
                tape.thetas[k] = theta
            if reads:
                tape.grads[k] = cast("Tensor", grads)
            if at.state:
                tape.states[k] = at.state
        if isinstance(grads, Pieces):
            return grads.descend(theta, at.lr), at.state
        return self.rule.step(at._replace(grads=grads))

    def reads_gradients(self, requires: set[str]) -> bool:
        """Whether the adjoint reads the gradients g_k."""
        return not self.rule.is_plain or "lr" in requires

    def _seen(self, k: int, support: Examples) -> Examples:
        return support if self.batches is None else self.batches.at(k, support)

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
        # Contiguous, so that batches of the support can be added to rows of it.
        result = {name: _zeros_like(named[name]) for name in mixed | hyperparameters}
        # In first order v_{k+1} reaches theta_k directly, not through g_k.
        of_step = hyperparameters if self.options.first_order else {"grads", *hyperparameters}
        v = query_grads[self.options.steps]
        # Zeros: nothing differentiable reads the last state. Not the rule's own start, which may be
        # a remembered state.
        plain = self.rule.is_plain and not hyperparameters and may_stay_in_pieces(v)
        state_v = () if plain else Rule.start(self.rule, joined(v))
        segments = Segments.of(self.options)

        def take(at: Step) -> tuple[Tensor, State]:
            return self._take(at, inputs.support, requires, tape)

        with self.passes.conditions():
            for k in reversed(range(self.options.steps)):
                tape.drop(k + 1)
                if segments is not None and k < tape.complete_from:
                    segments.complete(
                        tape, k, inputs.step_sizes, self.reads_gradients(requires), take
                    )
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
            seen = self._seen(k, support)
            product, mixed = self.passes.curvature(
                k, tape.thetas[k], direction, seen, requires, tape.randoms[k]
            )
        for name, tensor in mixed.items():
            if self.batches is not None and name.startswith(SUPPORT):
                self.batches.add(k, name, tensor, result[name])
            else:
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
            part, loop = inputs.of_tasks(chunk), self.of_tasks(chunk)
            queries = _WeightedQueries(self.passes, cast("Examples", part.query), requires, weights)
            adapted, tape = loop.run(part, requires, queries.add, may_keep=True)
            queries.add(self.options.steps, adapted)
            losses.append(queries.losses)
            outputs.append(queries.outputs)
            grads = queries.input_grads
            # A gradient of the queries only is complete without the adjoint.
            if not all(name.startswith(QUERY) for name in requires):
                to_theta, others = loop.adjoint(tape, queries.theta_grads, part, requires)
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


def _zeros_like(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor, memory_format=torch.contiguous_format)


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
