"""The meta-gradient by the adjoint recursion, as functions that autograd can differentiate once.

The K inner steps run without a graph and leave only the parameters theta_k ``[T, P]`` behind. The
backward takes one Hessian-vector product a step (Maclaurin 2015, Franceschi 2017; MAML: Finn 2017):

    v_K    = grad L_q(theta_K)
    v_k    = v_{k+1} - H_k (lr v_{k+1})           H_k = Hessian of L_s at theta_k
    d lr  += -g_k v_{k+1}                         summed over what shares a step size
    d x_s += -d<grad L_s(theta_k), lr v_{k+1}> / d x_s
    d phi += -d<grad L_s(theta_k), lr v_{k+1}> / d phi   after d phi = d L_q / d phi

phi are the parameters that are learned and not adapted, and the outer tensors, which tasks share.
So memory is K P a task and the activations of one step; an unrolled graph keeps K times the
activations. If they fit (``memory``), so does the meta-gradient, whose adjoint follows in the same
call: then no activation is computed twice. ``fastmeta.engines.segments`` keeps sqrt(K) of the
theta_k instead, and takes the steps between again. L_s and x_s may be another batch at each step.

With a query loss at every step, ``sum_k w_k L_q(theta_k)`` (MAML++: Antoniou 2019), the recursion
starts from ``w_K grad L_q(theta_K)`` and adds ``w_k grad L_q(theta_k)`` to v_k. Each weight other
than 0 takes another P a task.

A rule other than plain descent, ``theta_{k+1}, s_{k+1} = U(theta_k, g_k, s_k)``, replaces ``lr`` by
its own derivative. With ``(a, b, d s_k, c)`` the vector-Jacobian product of U on
``(v_{k+1}, d s_{k+1})``, ``v_k = a + H_k b``, and c goes to its learned hyperparameters. The
backward then reads theta_k, g_k and s_k: K P a task for each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastmeta.core.autocast import AutocastState
from fastmeta.core.checks import refuse_inference_mode
from fastmeta.core.derivatives import Tensors
from fastmeta.core.parameter_layout import ParameterLayout
from fastmeta.core.parameter_selection import shared_parameters
from fastmeta.core.pieces import joined
from fastmeta.core.step_sizes import StepSizes
from fastmeta.core.trees import Structure, Tree, concatenated, split
from fastmeta.engines.autograd import is_learned, once_differentiable
from fastmeta.engines.base import (
    Engine,
    Examples,
    InnerLoopOptions,
    MetaGradient,
    Minibatches,
    TaskBatch,
)
from fastmeta.engines.checks import check_arena, check_examples, read_step_weights
from fastmeta.engines.inner_loop import InnerLoop, LoopInputs, Passes, of_tasks
from fastmeta.engines.tape import Tape


def check_loop(
    layout: ParameterLayout, options: InnerLoopOptions, theta: Tensor, *sets: Examples
) -> int:
    """Check the inputs of an inner loop; returns the number of tasks."""
    tasks = check_examples(layout, *sets)
    check_arena("theta", layout, theta, tasks)
    # Without steps no gradient is taken, so inference mode may pass.
    if options.steps > 0:
        refuse_inference_mode("adaptation needs the gradient of the support loss")
    options.inner_rule.check(layout)
    return tasks


def adapt(
    passes: Passes,
    options: InnerLoopOptions,
    theta: Tensor,
    lr: float | Tensor,
    support: Examples,
    batches: Minibatches | None = None,
) -> Tensor:
    """The parameters of every task after K steps, as ``Engine.adapt``; the inputs are checked."""
    tasks = support.tasks
    step_sizes = StepSizes.of(lr, passes.layout, tasks, options.steps)
    if options.steps == 0:
        return theta.expand(tasks, passes.layout.numel)
    loop = InnerLoop(passes, options, batches)
    inputs = LoopInputs(theta, step_sizes, support)
    sources, rebuild = inputs.named(), inputs.rebuild()
    parts = (
        (loop.of_tasks(chunk), [of_tasks(name, tensor, chunk) for name, tensor in sources.items()])
        for chunk in options.chunks(tasks)
    )
    shared = {**loop.rule_parameters, **passes.outer}
    names = *sources, *shared
    # Read here: inside Function.forward gradients are always disabled.
    enabled = torch.is_grad_enabled()
    # One autograd node a chunk, so that the backward works through one chunk at a time.
    chunks = [
        _Adapt.apply(of, enabled, names, rebuild, *part, *shared.values()) for of, part in parts
    ]
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks)


def meta_loss(
    passes: Passes,
    options: InnerLoopOptions,
    theta: Tensor,
    lr: float | Tensor,
    batch: TaskBatch,
    step_weights: Sequence[float] | Tensor | None = None,
    batches: Minibatches | None = None,
) -> tuple[Tensor, Tree]:
    """The meta-loss and the outputs, as ``Engine.meta_loss``; the inputs are checked."""
    weights = read_step_weights(step_weights, options.steps)
    step_sizes = StepSizes.of(lr, passes.layout, batch.support.tasks, options.steps)
    # A step of weight 0 takes no query pass; the last one does, for the outputs.
    nonzero = {k: weight for k, weight in enumerate(weights, 1) if weight}
    by_step = {options.steps: 0.0, **nonzero} if weights else {options.steps: 1.0}
    loop = InnerLoop(passes, options, batches)
    inputs = LoopInputs(theta, step_sizes, batch.support, batch.query)
    named = {**inputs.named(), **loop.rule_parameters, **passes.outer}
    call = _MetaLossCall(loop, torch.is_grad_enabled(), tuple(named), inputs.rebuild(), by_step, [])
    loss, *outputs = _MetaLoss.apply(call, *named.values())
    return loss, call.outputs[0].of(outputs)


def meta_gradient(
    engine: Engine,
    start: Tensor | None,
    lr: float | Tensor,
    batch: TaskBatch,
    step_weights: Sequence[float] | Tensor | None = None,
    batches: Minibatches | None = None,
) -> MetaGradient:
    """The meta-loss of an engine with its gradient, as ``Engine.meta_gradient``."""
    theta = (engine.parameters() if start is None else start).detach().requires_grad_()
    sources = [theta]
    if is_learned(lr):
        lr = lr.detach().requires_grad_()
        sources.append(lr)
    options, shared = engine.options, shared_parameters(engine.module, engine.options.adapt)
    learned = {n: p for n, p in options.inner_rule.named_parameters() if p.requires_grad}
    outer = [tensor for tensor in options.outer if tensor.requires_grad]
    # The caller may have disabled gradients; this function exists to take one.
    with torch.enable_grad():
        loss, outputs = engine.meta_loss(theta, lr, batch.detached(), step_weights, batches)
    sources += [*learned.values(), *outer, *shared.values()]
    # A task program reads no outer tensor.
    grads = iter(torch.autograd.grad(loss, sources, allow_unused=True, materialize_grads=True))
    to_theta = next(grads)
    return MetaGradient(
        loss.detach(),
        outputs,
        grads=to_theta if start is None else to_theta.new_zeros(to_theta.shape[-1]),
        start_grads=None if start is None else to_theta,
        lr_grad=next(grads) if is_learned(lr) else None,
        rule_grads={name: next(grads) for name in learned},
        outer_grads=tuple(next(grads) for _ in outer),
        shared_grads={name: next(grads) for name in shared},
    )


def query_losses(
    passes: Passes,
    options: InnerLoopOptions,
    theta: Tensor,
    query: Examples,
    gradient: bool,
) -> tuple[Tensor, Tree, Tensor | None, Tensors]:
    """Each task's query loss, as ``Engine.query_losses``; the inputs are checked."""
    requires = {"theta", *_learned(passes)} if gradient else set()
    parts: list[list[Any]] = []
    to_shared: Tensors = {}
    with torch.no_grad():
        theta = theta.expand(query.tasks, passes.layout.numel)
        for tasks in options.chunks(query.tasks):
            part = query.of_tasks(tasks)
            # Norms with a row of parameters a step use the row of the last step.
            *found, mixed = passes.query(options.steps, theta[tasks], part, requires, 1.0)
            parts.append(found)
            _add_by_name(to_shared, mixed)
    losses, outputs, grads = zip(*parts, strict=True)
    to_theta = torch.cat([joined(g) for g in grads]) if gradient else None
    return torch.cat(losses), concatenated(outputs), to_theta, to_shared


def mixed_products(
    passes: Passes, options: InnerLoopOptions, theta: Tensor, support: Examples, vector: Tensor
) -> Tensors:
    """The mixed derivative times a vector, as ``Engine.mixed_products``; checks the vector."""
    tasks = support.tasks
    check_arena("vector", passes.layout, vector, tasks)
    theta, vector = (x.expand(tasks, passes.layout.numel) for x in (theta, vector))
    to_shared: Tensors = {}
    with torch.no_grad(), passes.conditions():
        for chunk in options.chunks(tasks):
            random, part = passes.random_state(theta.device), support.of_tasks(chunk)
            # Row 0 of norms with a row a step, as in the products with H.
            _, mixed = passes.curvature(
                0, theta[chunk], vector[chunk], part, _learned(passes), random
            )
            _add_by_name(to_shared, mixed)
    return to_shared


def _learned(passes: Passes) -> set[str]:
    """The names of what the tasks share and what requires a gradient."""
    return {name for name, tensor in passes.outer.items() if tensor.requires_grad}


def _add_by_name(totals: Tensors, parts: Tensors) -> None:
    for name, part in parts.items():
        totals[name] = totals[name] + part if name in totals else part


class _Adapt(torch.autograd.Function):
    """theta_K of a chunk of tasks; its backward is the adjoint recursion."""

    @staticmethod
    def forward(
        ctx: Any,
        loop: InnerLoop,
        enabled: bool,
        names: tuple[str, ...],
        rebuild: Callable[[Mapping[str, Tensor]], LoopInputs],
        *inputs: Tensor,
    ) -> Tensor:
        ctx.names, ctx.rebuild = names, rebuild
        # Detached: the passes enable gradients inside and must not reach the caller's graph.
        tensors = [tensor.detach() for tensor in inputs]
        ctx.requires = _requires(ctx, enabled, names)
        sources = rebuild(dict(zip(names, tensors, strict=True)))
        adapted, tape = loop.run(sources, ctx.requires)
        autocast = AutocastState(sources.theta.device)
        ctx.loop, ctx.randoms, ctx.autocast = loop, tape.randoms, autocast
        ctx.complete_from = tape.complete_from
        leaves, ctx.tree = tree_flatten((tensors, tape.thetas, tape.grads, tape.states))
        # The module's constants are saved for their version check: the backward reads them.
        ctx.save_for_backward(*leaves, *loop.constants)
        return adapted

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        # Reading saved_tensors raises if any of them, the constants too, was changed in place.
        leaves = ctx.saved_tensors[: ctx.tree.num_leaves]
        tensors, thetas, grads, states = tree_unflatten(leaves, ctx.tree)
        sources = ctx.rebuild(dict(zip(ctx.names, tensors, strict=True)))
        # A copy of the random states: the adjoint drops what it has read, and may be taken again.
        tape = Tape(thetas, grads, states, dict(ctx.randoms), complete_from=ctx.complete_from)
        loop = ctx.loop
        # A backward runs outside the caller's autocast, but takes the passes again as they ran.
        with torch.no_grad(), ctx.autocast.restored():
            to_theta, to_inputs = loop.adjoint(tape, {loop.options.steps: v}, sources, ctx.requires)
        to_inputs["theta"] = joined(to_theta)
        # A tensor that all tasks share, such as theta [P], gets the sum over the tasks.
        shaped = [
            to_inputs[name].sum_to_size(tensor.shape)
            if name in ctx.requires & set(to_inputs)
            else None
            for name, tensor in zip(ctx.names, tensors, strict=True)
        ]
        return None, None, None, None, *once_differentiable(shaped)


class _MetaLossCall(NamedTuple):
    """What a meta-loss takes besides tensors.

    Attributes:
        loop: the inner loop.
        enabled: whether gradients are, at the call.
        names: of the tensors.
        rebuild: from names and tensors to the loop's inputs.
        weights: as in ``InnerLoop.meta_gradient``.
        outputs: the structure of the outputs, once they are known.
    """

    loop: InnerLoop
    enabled: bool
    names: tuple[str, ...]
    rebuild: Callable[[Mapping[str, Tensor]], LoopInputs]
    weights: Mapping[int, float]
    outputs: list[Structure]


class _MetaLoss(torch.autograd.Function):
    """The meta-loss of all tasks, and its gradient in the same call.

    With gradients enabled the meta-gradient is taken in the forward, chunk by chunk, so that no
    more than a chunk's memory is ever held; the backward only scales it.
    """

    @staticmethod
    def forward(ctx: Any, call: _MetaLossCall, *inputs: Tensor) -> tuple[Tensor, ...]:
        detached = {name: x.detach() for name, x in zip(call.names, inputs, strict=True)}
        requires = _requires(ctx, call.enabled, call.names)
        sources = call.rebuild(detached)
        loss, outputs, grads = call.loop.meta_gradient(sources, requires, call.weights)
        ctx.save_for_backward(*(grads.get(name) for name in call.names))
        tensors, structure = split(outputs)
        call.outputs.append(structure)
        # The outputs are for metrics: a loss on them would have no adjoint here.
        ctx.mark_non_differentiable(*tensors)
        return loss, *tensors

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            grads = [None if g is None else g * grad_loss for g in ctx.saved_tensors]
        return None, *once_differentiable(grads)


def _requires(ctx: Any, enabled: bool, names: tuple[str, ...]) -> set[str]:
    # The arguments in front of the tensors (loop, flags, weights) never have a gradient.
    needed = ctx.needs_input_grad[-len(names) :]
    return {name for name, need in zip(names, needed, strict=True) if need and enabled}
