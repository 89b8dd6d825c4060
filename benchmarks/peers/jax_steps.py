"""JAX: jit of the unrolled vmap(grad), and of Hessian-vector products."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.common.networks import MLP, ContextMLP, LoraMLP, Network
from benchmarks.common.workloads import Arrays, draw_episode
from benchmarks.peers.step import Missing, Problem, Step

Array = jax.Array
Params = list[Array]


def _outputs(network: Network, params: Params, x: Array) -> Array:
    """Outputs of one task's examples, [B, ...] -> [B, N]."""
    if isinstance(network, ContextMLP):
        context, *params = params
        rows = jnp.broadcast_to(context, (len(x), *context.shape))
        return _outputs(network.body, params, jnp.concatenate([x, rows], -1))
    if isinstance(network, LoraMLP):
        for at in range(0, len(params), 4):
            weight, bias, down, up = params[at : at + 4]
            x = x @ weight.T + bias + (x @ down.T) @ up.T
            x = x if at + 4 == len(params) else jax.nn.relu(x)
        return x
    if isinstance(network, MLP):
        for weight, bias in zip(params[:-2:2], params[1:-2:2], strict=True):
            x = jax.nn.relu(x @ weight.T + bias)
    else:
        for block in range(4):
            x = _block(x, *params[4 * block : 4 * block + 4])
        x = x.reshape(len(x), -1)
    return x @ params[-2].T + params[-1]


def _block(x: Array, weight: Array, bias: Array, gain: Array, shift: Array) -> Array:
    layout = ("NCHW", "OIHW", "NCHW")
    x = lax.conv_general_dilated(x, weight, (1, 1), "SAME", dimension_numbers=layout)
    x = x + bias[:, None, None]
    mean, variance = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
    x = (x - mean) * lax.rsqrt(variance + 1e-5) * gain[:, None, None] + shift[:, None, None]
    window = (1, 1, 2, 2)
    return lax.reduce_window(jax.nn.relu(x), -jnp.inf, lax.max, window, window, "VALID")


def _mean_squared_error(outputs: Array, y: Array) -> Array:
    return ((outputs - y) ** 2).mean()


def _cross_entropy(outputs: Array, y: Array) -> Array:
    logs = jax.nn.log_softmax(outputs)
    return -jnp.take_along_axis(logs, y[:, None], 1).mean()


LOSSES = {"mse": _mean_squared_error, "cross_entropy": _cross_entropy}


def _loss_of(problem: Problem) -> Callable[[Params, Array, Array], Array]:
    network, loss = problem.workload.network, LOSSES[problem.workload.loss]
    return lambda params, x, y: loss(_outputs(network, params, x), y)


def _split(problem: Problem, flat: np.ndarray) -> Params:
    """[..., P] -> the parameters [..., *shape] in their order."""
    shapes = [p.shape for p in problem.workload.network.parameters()]
    ends = np.cumsum([math.prod(shape) for shape in shapes])[:-1]
    pieces = np.split(flat, ends, -1)
    pairs = zip(pieces, shapes, strict=True)
    return [jnp.asarray(p.reshape(*flat.shape[:-1], *shape)) for p, shape in pairs]


def _step(
    problem: Problem, function: Any, inputs: tuple[Any, ...], read: Callable[[Any], Arrays]
) -> Step:
    """Make a step that waits for each call: a training step needs the one before it."""
    compiled = jax.jit(function)
    facts = {"jax": jax.__version__, "float32 products in JAX": "highest"}
    return Step(lambda: jax.block_until_ready(compiled(*inputs)), read, facts=facts)


def _prepare(problem: Problem) -> None:
    if problem.device == "cuda" and jax.default_backend() != "gpu":
        raise Missing("JAX finds no GPU")
    jax.config.update("jax_default_matmul_precision", "highest")


def _meta_loss(problem: Problem) -> Callable[..., Array]:
    workload, loss_of = problem.workload, _loss_of(problem)

    def task_loss(params: Params, sx: Array, sy: Array, qx: Array, qy: Array) -> Array:
        for _ in range(workload.steps):
            gradients = jax.grad(loss_of)(params, sx, sy)
            params = [p - workload.lr * g for p, g in zip(params, gradients, strict=True)]
        return loss_of(params, qx, qy)

    def meta_loss(params: Params, *tasks: Array) -> Array:
        return jax.vmap(task_loss, (None, 0, 0, 0, 0))(params, *tasks).mean()

    return meta_loss


def _inputs(problem: Problem) -> tuple[Any, ...]:
    names = ("support_x", "support_y", "query_x", "query_y")
    tasks = (jnp.asarray(problem.arrays[name]) for name in names)
    return _split(problem, problem.arrays["theta"]), *tasks


def _read_meta(loss: Array, gradients: Params) -> Arrays:
    flat = np.concatenate([np.asarray(g).ravel() for g in gradients])
    return {"loss": np.asarray(loss), "gradient": flat}


def unrolled(problem: Problem) -> Step:
    _prepare(problem)
    function = jax.value_and_grad(_meta_loss(problem))
    return _step(problem, function, _inputs(problem), lambda result: _read_meta(*result))


def some(problem: Problem) -> Step:
    """`unrolled` where a task adapts some of the parameters and some are learned."""
    _prepare(problem)
    workload, loss_of = problem.workload, _loss_of(problem)
    network, params = workload.network, _split(problem, problem.arrays["theta"])
    learned = [p for p, learns in zip(params, network.learned, strict=True) if learns]

    def placed(chosen: list[bool], own: Params, others: Params) -> Params:
        rest = iter(own)
        return [next(rest) if c else p for c, p in zip(chosen, others, strict=True)]

    def task_loss(params: Params, sx: Array, sy: Array, qx: Array, qy: Array) -> Array:
        own = [p for p, adapts in zip(params, network.adapted, strict=True) if adapts]
        for _ in range(workload.steps):
            gradients = jax.grad(lambda own: loss_of(placed(network.adapted, own, params), sx, sy))(
                own
            )
            own = [p - workload.lr * g for p, g in zip(own, gradients, strict=True)]
        return loss_of(placed(network.adapted, own, params), qx, qy)

    def meta_loss(learned: Params, params: Params, *tasks: Array) -> Array:
        every = placed(network.learned, learned, params)
        return jax.vmap(task_loss, (None, 0, 0, 0, 0))(every, *tasks).mean()

    _, *tasks = _inputs(problem)
    function = jax.value_and_grad(meta_loss)
    return _step(problem, function, (learned, params, *tasks), lambda result: _read_meta(*result))


def iteration(problem: Problem) -> Step:
    """An episode, the meta-loss, its gradient and a step of Adam of no length, compiled as one."""
    _prepare(problem)
    gradient = jax.value_and_grad(_meta_loss(problem))

    def update(params: Params, state: Any, *tasks: Array) -> Any:
        count, means, squares = state
        loss, gradients = gradient(params, *tasks)
        means = [0.9 * m + 0.1 * g for m, g in zip(means, gradients, strict=True)]
        squares = [0.999 * s + 0.001 * g * g for s, g in zip(squares, gradients, strict=True)]
        of_means, of_squares = 1 - 0.9**count, 1 - 0.999**count
        params = [
            p - 0.0 * (m / of_means) / (jnp.sqrt(s / of_squares) + 1e-8)
            for p, m, s in zip(params, means, squares, strict=True)
        ]
        return loss, gradients, params, (count + 1, means, squares)

    compiled = jax.jit(update)
    params, *_ = _inputs(problem)
    zeros = [jnp.zeros_like(p) for p in params]
    held = [params, (jnp.asarray(1.0), zeros, zeros)]

    def run() -> tuple[Array, Params]:
        tasks = draw_episode(problem.workload).values()
        loss, gradients, *held[:] = jax.block_until_ready(compiled(*held, *tasks))
        return loss, gradients

    facts = {"jax": jax.__version__, "float32 products in JAX": "highest"}
    return Step(run, lambda result: _read_meta(*result), facts=facts)


def head(problem: Problem) -> Step:
    """`unrolled` with gradients to the features of support and queries."""
    _prepare(problem)

    def read(result: tuple[Array, tuple[Any, Array, Array]]) -> Arrays:
        loss, (gradients, support, query) = result
        of_features = {"support": np.asarray(support), "query": np.asarray(query)}
        return {**_read_meta(loss, gradients), **of_features}

    function = jax.value_and_grad(_meta_loss(problem), (0, 1, 3))
    return _step(problem, function, _inputs(problem), read)


def _hvp_step(problem: Problem, product: Callable[..., Params]) -> Step:
    def read(result: Params) -> Arrays:
        rows = [np.asarray(p).reshape(len(p), -1) for p in result]
        return {"product": np.concatenate(rows, 1)}

    params, v = (_split(problem, problem.arrays[name]) for name in ("theta", "vector"))
    x, y = (jnp.asarray(problem.arrays[name]) for name in ("x", "y"))
    return _step(problem, jax.vmap(product), (params, v, x, y), read)


def hvp_forward(problem: Problem) -> Step:
    """Forward over reverse, as JAX's documentation does it."""
    _prepare(problem)
    loss_of = _loss_of(problem)

    def product(params: Params, v: Params, x: Array, y: Array) -> Params:
        return jax.jvp(lambda p: jax.grad(loss_of)(p, x, y), (params,), (v,))[1]

    return _hvp_step(problem, product)


def hvp_reverse(problem: Problem) -> Step:
    _prepare(problem)
    loss_of = _loss_of(problem)

    def product(params: Params, v: Params, x: Array, y: Array) -> Params:
        return jax.vjp(lambda p: jax.grad(loss_of)(p, x, y), params)[1](v)[0]

    return _hvp_step(problem, product)
