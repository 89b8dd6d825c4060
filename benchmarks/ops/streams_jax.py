"""JAX on the problems of the benchmark of streams: jit of vmap(grad), unrolled."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from benchmarks.ops.streams import Problem

Array = jax.Array


def contender(problem: Problem) -> Callable[[], list[Tensor]]:
    """The gradients to the parameters and the examples; each call waits for its result."""
    jax.config.update("jax_default_matmul_precision", "highest")
    case, sizes = problem.case, [shape.numel() for shape in problem.layout.shapes]
    ends = np.cumsum(sizes)[:-1]

    def loss_of(theta: Array, x: Array, y: Array) -> Array:
        pieces = zip(jnp.split(theta, ends), problem.layout.shapes, strict=True)
        weight, bias, after, shift = (piece.reshape(shape) for piece, shape in pieces)
        hidden = jax.nn.gelu(x @ weight.T + bias, approximate=False)
        return ((hidden @ after.T + shift - y) ** 2).mean()

    gradients, losses = jax.vmap(jax.grad(loss_of)), jax.vmap(loss_of)

    def of_stream(theta: Array, x: Array, y: Array) -> Array:
        values = []
        for c in range(case.steps):
            values.append(losses(theta, x[:, c], y[:, c]))
            theta = theta - 0.1 * gradients(theta, x[:, c], y[:, c])
        return jnp.stack(values).mean()

    def of_step(theta: Array, x: Array, y: Array, upstream: Array) -> tuple[Array, ...]:
        _, pull = jax.vjp(lambda theta, x: gradients(theta, x[:, 0], y[:, 0]), theta, x)
        return pull(upstream)

    names = [problem.theta, problem.x, problem.y]
    names += [problem.upstream] if case.steps == 1 else []
    inputs = [jnp.asarray(tensor.detach().numpy()) for tensor in names]
    compiled = jax.jit(of_step if case.steps == 1 else jax.grad(of_stream, (0, 1)))

    def run() -> list[Tensor]:
        return [torch.from_dlpack(grad) for grad in jax.block_until_ready(compiled(*inputs))]

    return run
