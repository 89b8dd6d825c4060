"""The functional engine: the meta-gradient of any module by the adjoint recursion.

The K inner steps run without a graph and leave only the parameters theta_k ``[T, P]`` behind; the
way back takes one Hessian-vector product a step (Maclaurin 2015, Franceschi 2017; MAML: Finn 2017):

    v_K    = grad L_q(theta_K)
    v_k    = v_{k+1} - H_k (lr v_{k+1})           H_k = Hessian of L_s at theta_k
    d lr  += -g_k v_{k+1}                         summed over what shares a step size
    d x_s += -d<grad L_s(theta_k), lr v_{k+1}> / d x_s

so memory is K P a task and the activations of one step, where an unrolled graph keeps those of K.
With a query loss at every step, ``sum_k w_k L_q(theta_k)`` (MAML++: Antoniou 2019), the way back
starts from ``w_K grad L_q(theta_K)`` and adds ``w_k grad L_q(theta_k)`` to v_k, which takes another
P a task for each weight that is not 0.

A rule other than plain descent, ``theta_{k+1}, s_{k+1} = U(theta_k, g_k, s_k)``, puts its own
derivative in the place of ``lr``: with ``(a, b, d s_k, c)`` the vector-Jacobian product of U on
``(v_{k+1}, d s_{k+1})``, ``v_k = a + H_k b``, and c goes to its learned hyperparameters. The way
back then takes theta_k, g_k and s_k: K P a task for each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, vjp
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastmeta.core.autocast import AutocastState
from fastmeta.core.checks import check_choice, check_integer, refuse_inference_mode
from fastmeta.core.derivatives import MODES, Tensors, central_difference, tangent
from fastmeta.core.inner_step import inner_step
from fastmeta.core.parameter_layout import ParameterLayout
from fastmeta.engines.base import (
    NORM_STATISTICS,
    QUERY,
    SUPPORT,
    Loss,
    exclude_from_compile,
    is_learned,
    once_differentiable,
    read_step_weights,
)
from fastmeta.engines.checks import check_arena, check_data, checked_rows
from fastmeta.engines.functional.label_checks import with_checked_labels
from fastmeta.engines.functional.passes import ModulePasses
from fastmeta.engines.functional.task_module import TaskModule
from fastmeta.engines.inner_loop import InnerLoop, Minibatches, Passes, Tape, take_tasks
from fastmeta.ops.hvp import hvp
from fastmeta.rules.base import Rule
from fastmeta.rules.sgd import PLAIN

__all__ = ["FunctionalEngine", "hvp"]


@dataclass(frozen=True)
class FunctionalEngine:
    """Adaptation, meta-gradient and Hessian-vector product of any module.

    Args:
        module: any module of one input and one output tensor; its trainable parameters are adapted.
        loss: ``loss(outputs, targets)`` of one task -> scalar, the mean over the task's examples.
        steps: K, inner gradient steps; 0 adapts nothing.
        first_order: leave the Hessian out (FOMAML): ``v_k = v_{k+1}``. No graph of the inner
            gradients is built and no HVP taken. Step sizes still get ``-g_k v_{k+1}``; the support
            gets no gradient.
        hvp_mode: ``"reverse"``, ``"forward"`` or ``"finite_difference"``, as in ``hvp``.
        task_chunk: tasks that run together; None is all of them. Memory grows with it, results do
            not depend on it beyond rounding (random numbers, as in dropout, do). 1 runs each
            task by itself, without vmap, for modules that vmap cannot take.
        norm_statistics: what batch and instance norms that track running statistics normalise by:
            ``"batch"``, those of the batch always, or ``"running"``, in ``eval()`` the running ones
            as in any module. Neither updates the running ones.
        rule: what takes the inner steps, see ``fastmeta.rules``; None: plain descent.

    Raises:
        TypeError, ValueError: an option of the wrong type or out of range.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(1, 1)
        >>> engine = FunctionalEngine(net, torch.nn.functional.mse_loss, steps=2)
        >>> x, y = torch.randn(4, 10, 1), torch.randn(4, 10, 1)
        >>> loss, outputs = engine.meta_loss(engine.parameters(), 0.1, x, y, x, y)
        >>> loss.backward()
        >>> outputs.shape, net.weight.grad.shape
        (torch.Size([4, 10, 1]), torch.Size([1, 1]))
    """

    module: nn.Module
    loss: Loss
    steps: int = 1
    first_order: bool = False
    hvp_mode: str = "reverse"
    task_chunk: int | None = None
    norm_statistics: str = "batch"
    rule: Rule | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.module, nn.Module):
            raise TypeError(f"module: expected an nn.Module, got {type(self.module).__name__}")
        if not callable(self.loss):
            raise TypeError(f"loss: expected a callable, got {type(self.loss).__name__}")
        check_integer("steps", self.steps, 0)
        if self.task_chunk is not None:
            check_integer("task_chunk", self.task_chunk, 1)
        if not isinstance(self.first_order, bool):
            raise TypeError(f"first_order: expected a bool, got {self.first_order!r}")
        check_choice("hvp_mode", self.hvp_mode, MODES)
        check_choice("norm_statistics", self.norm_statistics, NORM_STATISTICS)
        if not (self.rule is None or isinstance(self.rule, Rule)):
            raise TypeError(f"rule: expected a fastmeta.rules.Rule, got {type(self.rule).__name__}")

    @property
    def inner_rule(self) -> Rule:
        """What takes the inner steps."""
        return PLAIN if self.rule is None else self.rule

    @property
    def is_plain(self) -> bool:
        """Whether the inner steps are plain descent."""
        return self.rule is None or self.rule.is_plain

    def parameters(self) -> Tensor:
        """The module's own trainable parameters as an arena ``[P]``, a differentiable copy."""
        return ParameterLayout.of(self.module).flatten(dict(self.module.named_parameters()))

    def task_module(self) -> TaskModule:
        """The module as a function of parameters, as this engine runs it."""
        return TaskModule(self.module, self.norm_statistics)

    @exclude_from_compile
    def adapt(
        self,
        theta: Tensor | None,
        lr: float | Tensor,
        support_x: Tensor,
        support_y: Tensor,
        rows: Tensor | None = None,
    ) -> Tensor:
        """The parameters of every task after K steps.

        Args:
            theta: starting parameters, ``[P]`` for all tasks or ``[T, P]``; None for the module's
                own.
            lr: a number, or a tensor as in ``ParameterLayout.step_size_array``; three
                dimensions are one matrix a step.
            support_x: ``[T, S, ...]``.
            support_y: ``[T, S, ...]``; int64 labels or floating-point targets.
            rows: ``[K, B]`` int64: the examples that each step sees, the same of every task; None:
                all of them at every step.

        Returns:
            ``[T, P]``, differentiable once in theta, lr and floating-point support.

        Raises:
            TypeError, ValueError: naming the argument that does not fit; no tasks or no examples.
            RuntimeError: inference mode, which has no gradients; or a second derivative.
        """
        theta = self.parameters() if theta is None else theta
        data = dict(zip(SUPPORT, (support_x, support_y), strict=True))
        loop, tasks, step = self._prepare(theta, lr, data, rows)
        if self.steps == 0:
            return theta.expand(tasks, loop.passes.layout.numel)
        sources = {"theta": theta, "lr": step, **data}
        parts = (_take_all(sources, rows) for rows in self._chunks(tasks))
        enabled, learned = torch.is_grad_enabled(), loop.rule_parameters.values()
        chunks = [_Adapt.apply(loop, enabled, *part, *learned) for part in parts]
        return chunks[0] if len(chunks) == 1 else torch.cat(chunks)

    @exclude_from_compile
    def meta_loss(
        self,
        theta: Tensor | None,
        lr: float | Tensor,
        support_x: Tensor,
        support_y: Tensor,
        query_x: Tensor,
        query_y: Tensor,
        step_weights: Sequence[float] | Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The mean over tasks of the query loss after adaptation, or after each of its steps.

        With gradients enabled the meta-gradient is taken here, chunk by chunk, so that no more than
        a chunk's memory is ever held; ``backward`` only hands it out.

        Args:
            theta, lr, support_x, support_y: as for ``adapt``.
            query_x, query_y: ``[T, Q, ...]``.
            step_weights: w_1 .. w_K of the query losses after each step, ``sum_k w_k L_q(theta_k)``
                (MAML++: Antoniou 2019). A step of weight 0 takes no query pass, but for the outputs
                of the last. None: the last step's loss alone.

        Returns:
            loss (scalar), differentiable once in theta, lr and floating-point data; and the
            detached outputs on the queries at theta_K ``[T, Q, ...]``.

        Raises:
            TypeError, ValueError, RuntimeError: as for ``adapt``; weights that are not K finite
                numbers.
        """
        theta = self.parameters() if theta is None else theta
        weights = read_step_weights(step_weights, self.steps)
        data = dict(zip(SUPPORT + QUERY, (support_x, support_y, query_x, query_y), strict=True))
        loop, tasks, step = self._prepare(theta, lr, data)
        nonzero = {k: weight for k, weight in enumerate(weights, 1) if weight}
        by_step = {self.steps: 0.0, **nonzero} if weights else {self.steps: 1.0}
        options = loop, torch.is_grad_enabled(), self._chunks(tasks), by_step
        inputs = theta, step, *data.values(), *loop.rule_parameters.values()
        return _MetaLoss.apply(*options, *inputs)

    @exclude_from_compile
    def meta_gradient(
        self,
        lr: float | Tensor,
        support_x: Tensor,
        support_y: Tensor,
        query_x: Tensor,
        query_y: Tensor,
        step_weights: Sequence[float] | Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensors]:
        """The meta-loss from the module's own parameters, with its gradient.

        Args:
            lr, support_x, support_y, query_x, query_y, step_weights: as for ``meta_loss``.

        Returns:
            loss (scalar), outputs ``[T, Q, ...]``, the gradient to the parameters ``[P]``, that to
            ``lr``, if it is a tensor that requires one, in its shape, and those to the rule's
            parameters that do, by name. None has a graph.

        Raises:
            TypeError, ValueError, RuntimeError: as for ``meta_loss``.
        """
        theta = self.parameters().detach().requires_grad_()
        sources = [theta]
        if is_learned(lr):
            lr = lr.detach().requires_grad_()
            sources.append(lr)
        support_x, support_y, query_x, query_y = (
            t.detach() if isinstance(t, Tensor) else t
            for t in (support_x, support_y, query_x, query_y)
        )
        learned = {n: p for n, p in self.inner_rule.named_parameters() if p.requires_grad}
        with torch.enable_grad():
            data = support_x, support_y, query_x, query_y
            loss, outputs = self.meta_loss(theta, lr, *data, step_weights)
        grads = torch.autograd.grad(loss, [*sources, *learned.values()])
        to_lr = grads[1] if is_learned(lr) else None
        to_rule = dict(zip(learned, grads[len(sources) :], strict=True))
        return loss.detach(), outputs, grads[0], to_lr, to_rule

    @exclude_from_compile
    def query_losses(
        self, params: Tensor, query_x: Tensor, query_y: Tensor, gradient: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Each task's query loss at given parameters, as at those after K steps.

        Args:
            params: ``[P]`` for all tasks or ``[T, P]``.
            query_x, query_y: ``[T, Q, ...]``.
            gradient: whether it is wanted.

        Returns:
            losses ``[T]``, outputs ``[T, Q, ...]``, and the gradient of each task's loss to its
            parameters ``[T, P]``. None has a graph.

        Raises:
            TypeError, ValueError, RuntimeError: as for ``adapt``.
        """
        data = dict(zip(QUERY, (query_x, query_y), strict=True))
        wants, parts = {"theta"} if gradient else set(), []
        with torch.no_grad():
            loop, tasks, _ = self._prepare(params, 0.0, data)
            params = params.expand(tasks, loop.passes.layout.numel)
            for rows in self._chunks(tasks):
                part = {name: tensor[rows] for name, tensor in data.items()}
                parts.append(loop.passes.query(self.steps, params[rows], part, wants, 1.0))
        losses, outputs, grads = zip(*parts, strict=True)
        to_params = torch.cat([g["theta"] for g in grads]) if gradient else None
        return torch.cat(losses), torch.cat(outputs), to_params

    @exclude_from_compile
    def hvp(self, params: Tensor, x: Tensor, y: Tensor, vector: Tensor) -> Tensor:
        """The Hessian of each task's loss on ``(x, y)`` times a vector (Pearlmutter 1994).

        Args:
            params: where the Hessian is taken, ``[P]`` for all tasks or ``[T, P]``.
            x, y: the examples ``[T, B, ...]``.
            vector: ``[P]`` for all tasks or ``[T, P]``.

        Returns:
            ``[T, P]``, differentiable wherever the result of ``fastmeta.hvp`` is.

        Raises:
            TypeError, ValueError, RuntimeError: as for ``adapt``.
        """
        layout, data = ParameterLayout.of(self.module), {"x": x, "y": y}
        tasks = check_data(layout, data)
        sources = {"params": params, "vector": vector}
        for name, arena in sources.items():
            check_arena(name, layout, arena, tasks)
        refuse_inference_mode("the product needs the gradient of the loss")
        call, loss = self.task_module(), with_checked_labels(self.loss, y, "y")
        products = []
        with call.conditions(), inner_step(0):
            for rows in self._chunks(tasks):
                at, along = (a.expand(tasks, layout.numel)[rows] for a in sources.values())
                part = x[rows], y[rows]

                def total(theta: Tensor, part: tuple[Tensor, Tensor] = part) -> Tensor:
                    return call.losses(layout.views(theta), *part, loss)[0].sum()

                products.append(_product(total, at, along, self.hvp_mode))
        return torch.cat(products)

    def _prepare(
        self, theta: Tensor, lr: float | Tensor, data: Tensors, rows: Tensor | None = None
    ) -> tuple[InnerLoop, int, Tensor]:
        layout = ParameterLayout.of(self.module)
        tasks = check_data(layout, data)
        check_arena("theta", layout, theta, tasks)
        if self.steps > 0:
            refuse_inference_mode("adaptation needs the gradient of the support loss")
        rule = self.inner_rule
        rule.check(layout)
        whole = self.is_plain and rows is None and "support_x" in data
        every = self._passes(theta, data, whole)
        passes: Passes = every
        if rows is not None:
            passes = Minibatches(every, checked_rows(rows, self.steps, data["support_x"]))
        loop = InnerLoop(passes, self.steps, self.first_order, rule)
        return loop, tasks, layout.step_size_array(lr, tasks, self.steps)

    def _passes(self, theta: Tensor, data: Tensors, whole: bool) -> Passes:
        """What inner loops are made of; ``whole``: one that a program has in one call, if any."""
        losses = {
            name.removesuffix("_y"): with_checked_labels(self.loss, data[name], name)
            for name in data
            if name.endswith("_y")
        }
        options = self.steps, self.first_order, self.hvp_mode
        return ModulePasses(ParameterLayout.of(self.module), self.task_module(), losses, *options)

    def _chunks(self, tasks: int) -> list[slice]:
        size = self.task_chunk or tasks
        return [slice(start, start + size) for start in range(0, tasks, size)]


def _product(total: Callable[[Tensor], Tensor], theta: Tensor, vector: Tensor, mode: str) -> Tensor:
    """Hessian of the summed loss of all tasks times ``vector``; tasks do not mix."""
    if mode == "reverse":
        return vjp(grad(total), theta)[1](vector)[0]
    along = tangent if mode == "forward" else central_difference
    return along(grad(total), theta, vector)[1]


_ADAPT_INPUTS = ("theta", "lr", *SUPPORT)

_META_LOSS_INPUTS = (*_ADAPT_INPUTS, *QUERY)


class _Adapt(torch.autograd.Function):
    """theta_K of a chunk of tasks; its backward is the adjoint recursion."""

    @staticmethod
    def forward(ctx: Any, loop: InnerLoop, enabled: bool, *inputs: Tensor) -> Tensor:
        ctx.names = *_ADAPT_INPUTS, *loop.rule_parameters
        sources = {n: x.detach() for n, x in zip(ctx.names, inputs, strict=True)}
        ctx.wants = _wanted(ctx, enabled, ctx.names)
        theta, tape = loop.run(sources["theta"], sources["lr"], sources, ctx.wants)
        ctx.loop, ctx.randoms, ctx.autocast = loop, tape.randoms, AutocastState(theta.device)
        leaves, ctx.kept = tree_flatten((sources, tape.thetas, tape.grads, tape.states))
        # The module's constants are saved for their version check alone: the way back reads them.
        ctx.save_for_backward(*leaves, *loop.passes.constants)
        return theta

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        leaves = ctx.saved_tensors[: ctx.kept.num_leaves]
        sources, thetas, slopes, states = tree_unflatten(leaves, ctx.kept)
        loop, tape = ctx.loop, Tape(thetas, slopes, states, ctx.randoms)
        with torch.no_grad(), ctx.autocast.restored():
            grads = loop.adjoint(tape, {loop.steps: v}, sources["lr"], sources, ctx.wants)
        shaped = [
            grads[name].sum_to_size(sources[name].shape) if name in ctx.wants & set(grads) else None
            for name in ctx.names
        ]
        return None, None, *once_differentiable(shaped)


class _MetaLoss(torch.autograd.Function):
    """The meta-loss of all tasks, and its gradient in the same call."""

    @staticmethod
    def forward(
        ctx: Any,
        loop: InnerLoop,
        enabled: bool,
        chunks: list[slice],
        weights: Mapping[int, float],
        *inputs: Tensor,
    ) -> tuple[Tensor, Tensor]:
        names = *_META_LOSS_INPUTS, *loop.rule_parameters
        theta, step, *tensors = (x.detach() for x in inputs[: len(_META_LOSS_INPUTS)])
        data = dict(zip(SUPPORT + QUERY, tensors, strict=True))
        wants = _wanted(ctx, enabled, names)
        loss, outputs, grads = loop.meta_gradient(theta, step, data, wants, chunks, weights)
        ctx.save_for_backward(*(grads.get(name) for name in names))
        ctx.mark_non_differentiable(outputs)
        return loss, outputs

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            grads = [None if g is None else g * grad_loss for g in ctx.saved_tensors]
        return None, None, None, None, *once_differentiable(grads)


def _wanted(ctx: Any, enabled: bool, names: tuple[str, ...]) -> set[str]:
    needed = ctx.needs_input_grad[-len(names) :]
    return {name for name, need in zip(names, needed, strict=True) if need and enabled}


def _take_all(sources: Tensors, rows: slice) -> list[Tensor]:
    return [take_tasks(name, value, rows) for name, value in sources.items()]
