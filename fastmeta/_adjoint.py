"""K inner steps of many tasks without a graph, and the adjoint recursion back through them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastmeta._hvp import Tensors, Total, curvature, gradient
from fastmeta._inner_step import inner_step
from fastmeta._replay import RandomState
from fastmeta._stateless import Loss, TaskModule
from fastmeta.arena import Layout
from fastmeta.ops.inner_update import inner_update

SUPPORT = ("support_x", "support_y")
QUERY = ("query_x", "query_y")

# Activations that a reverse Hessian-vector product keeps, in those of a gradient: measured 2.9 on
# Conv4-64 and 2.8 on an MLP.
_HVP_ACTIVATIONS = 3


@dataclass
class Tape:
    """What K steps leave behind for the way back.

    Attributes:
        states: theta_0 .. theta_{K-1} ``[T, P]``, for the second order.
        randoms: the generators before each step, for the second order.
        grads: g_0 .. g_{K-1} ``[T, P]``, for the step sizes in first order.
    """

    states: list[Tensor] = field(default_factory=list)
    randoms: list[RandomState] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class InnerLoop:
    """The inner loop of the tasks of one call, its adjoint, and the query loss.

    ``wants`` names the tensors whose gradient is asked for, among ``theta``, ``lr``, ``support_x``,
    ``support_y``, ``query_x`` and ``query_y``. ``step`` holds the step sizes as
    ``[K or 1, T or 1, P or 1]``. All tensors come detached.

    Attributes:
        layout: of the arenas ``[T, P]``.
        call: the module.
        losses: the loss by role, ``"support"`` and ``"query"``.
        steps, first_order, hvp_mode: as in ``FunctionalEngine``.
    """

    layout: Layout
    call: TaskModule
    losses: dict[str, Loss]
    steps: int
    first_order: bool
    hvp_mode: str

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
        tape = Tape()
        theta = theta.expand(len(data["support_x"]), self.layout.numel)
        total = self._total("support", data)
        with self.call.conditions():
            for k in range(self.steps):
                if visit is not None:
                    visit(k, theta)
                if not self.first_order and wants.intersection(("theta", "lr", *SUPPORT)):
                    tape.states.append(theta)
                    tape.randoms.append(RandomState(theta.device))
                with inner_step(k):
                    grads, _ = gradient(total, self.layout.views(theta), {})
                arena = self.layout.flatten(grads)
                if self.first_order and "lr" in wants:
                    tape.grads.append(arena)
                theta = inner_update(theta, arena, step[_row(step, k)])
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
            name -> gradient: ``theta`` ``[T, P]``; ``lr`` in the shape of ``step``; the support as
            it is, but not in first order.
        """
        inputs = {} if self.first_order else {n: data[n] for n in SUPPORT if n in wants}
        result = {name: torch.zeros_like(tensor) for name, tensor in inputs.items()}
        if "lr" in wants:
            result["lr"] = torch.zeros_like(step)
        v = pulls[self.steps]
        with self.call.conditions():
            for k in reversed(range(self.steps)):
                row = _row(step, k)
                grads, product, mixed = self._step_back(tape, k, step[row], v, data, inputs)
                if "lr" in result:
                    result["lr"][row].sub_((grads * v).sum_to_size(step.shape[1:]))
                for name, tensor in mixed.items():
                    result[name] += tensor
                for pull in (product, pulls.get(k)):
                    v = v if pull is None else v + pull
        return {**result, "theta": v}

    def _step_back(
        self, tape: Tape, k: int, step: Tensor, v: Tensor, data: Tensors, inputs: Tensors
    ) -> tuple[Tensor | None, Tensor | None, Tensors]:
        """g_k, ``-H_k (step v)`` and the gradient to the inputs; None for what is not needed."""
        if self.first_order:
            return (tape.grads[k] if tape.grads else None), None, {}
        total, params = self._total("support", data), self.layout.views(tape.states[k])
        # A number comes in float32 where v is of half precision, which the direction has to keep.
        direction = self.layout.views((-step * v).to(v.dtype))
        with tape.randoms[k].replay(), inner_step(k):
            grads, product, mixed = curvature(total, params, direction, inputs, self.hvp_mode)
        return self.layout.flatten(grads), self.layout.flatten(product), mixed

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
        losses, outputs, grads = [], [], []
        with self.call.conditions(), inner_step(k):
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
        result = {n: torch.zeros_like(sources[n]) for n in wants if n not in unreached}
        losses, outputs = [], []
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

    def _total(
        self,
        role: str,
        data: Tensors,
        kept: tuple[list, list] | None = None,
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
        if self.steps > 0:
            passes = 1 if self.first_order else _HVP_ACTIVATIONS
            size = max(1, passes * tasks * data["support_x"].shape[1] // queries)
        return (slice(start, start + size) for start in range(0, tasks, size))


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
        losses, self.outputs, grads = self.loop.query(k, theta, self.data, wants, weight)
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
    """A chunk of the tasks' rows; parameters and step sizes that tasks share stay whole."""
    if name == "lr":
        return tensor if tensor.shape[1] == 1 else tensor[:, rows]
    return tensor if name == "theta" and tensor.ndim < 2 else tensor[rows]
