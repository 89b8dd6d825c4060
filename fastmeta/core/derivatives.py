"""Derivatives of the summed loss of many tasks, and Hessian-vector products in three modes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, jvp, vjp
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from fastmeta.core.random_state import RandomState

MODES = ("reverse", "forward", "finite_difference")

# Parameters and inputs of all tasks by name, tensors [T, ...].
Tensors = dict[str, Tensor]

# The summed loss of all tasks. Tasks do not mix, so its derivatives are each task's own.
Total = Callable[[Tensors, Tensors], Tensor]

# Gets the total with its graph, and the tensors to which the gradient is taken; may raise.
Check = Callable[[Tensor, list[Tensor]], None]


def curvature(
    total: Total,
    params: Tensors,
    vector: Tensors,
    inputs: Tensors,
    mode: str,
    captured: Tensors | None = None,
) -> tuple[Tensors, Tensors]:
    """Hessian-vector product, and the derivative of ``<grad, vector>`` to the inputs.

    One step of the adjoint recursion takes both. They are computed outside ``torch.func``
    transforms, and the result has no graph.

    Args:
        total: the summed loss of all tasks as a function of parameters and inputs.
        params, vector: name -> ``[T, ...]``.
        inputs: name -> ``[T, ...]``, those whose derivative is required.
        mode: as for ``hvp``.
        captured: name -> tensor that ``total`` reads by itself, whose derivative is required.

    Returns:
        ``(H vector, d<g, vector>/d inputs and captured)``, each by name.
    """
    if mode == "reverse":
        return Linearized.of(total, params, inputs, captured).product(vector)
    if captured:
        # Only autograd reaches a tensor that is no argument; both passes draw the same numbers.
        random = RandomState(next(iter(params.values())).device)
        product, mixed = curvature(total, params, vector, inputs, mode)
        with random.replay():
            _, more = Linearized.of(total, params, {}, captured).product(vector)
        return product, {**mixed, **more}
    if mode == "forward":
        gradients = grad(total, argnums=(0, 1))
        return tangent(lambda p: gradients(p, inputs), params, vector)[1]
    return central_difference(lambda p: gradient(total, p, inputs), params, vector)[1]


def gradient(
    total: Total,
    params: Tensors,
    inputs: Tensors,
    captured: Tensors | None = None,
    check: Check | None = None,
) -> tuple[Tensors, Tensors]:
    """Gradient of the summed loss to parameters, and to inputs and captured tensors; no graph.

    ``check`` gets the value with its graph, and the tensors to which the gradient is taken.
    """
    params, inputs = _leaves(params), {**_leaves(inputs), **(captured or {})}
    with torch.enable_grad():
        value = total(params, inputs)
    sources = [*params.values(), *inputs.values()]
    if check is not None:
        check(value, sources)
    return _split(derivative([value], [torch.ones_like(value)], sources), params, inputs)


@dataclass(frozen=True)
class Linearized:
    """The gradient of the summed loss with its graph, for one product with the Hessian.

    Attributes:
        params, inputs: the tensors that the graph starts from, by name.
        grads: name -> gradient ``[T, ...]`` to the parameter, with the graph.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0, 2.0]])
        >>> linear = Linearized.of(lambda params, _: params["x"].pow(3).sum(), {"x": x}, {})
        >>> linear.grads["x"].detach()
        tensor([[ 3., 12.]])
        >>> linear.product({"x": torch.ones(1, 2)})[0]
        {'x': tensor([[ 6., 12.]])}
    """

    params: Tensors
    inputs: Tensors
    grads: Tensors

    @classmethod
    def of(
        cls,
        total: Total,
        params: Tensors,
        inputs: Tensors,
        captured: Tensors | None = None,
        check: Check | None = None,
    ) -> Linearized:
        """Take the gradient at ``params``; its arguments are as for ``gradient``."""
        params, inputs = _leaves(params), {**_leaves(inputs), **(captured or {})}
        sources = list(params.values())
        with torch.enable_grad():
            value = total(params, inputs)
            if check is not None:
                check(value, [*sources, *inputs.values()])
            grads = derivative([value], [torch.ones_like(value)], sources, create_graph=True)
        return cls(params, inputs, dict(zip(params, grads, strict=True)))

    def product(self, vector: Tensors) -> tuple[Tensors, Tensors]:
        """``H vector`` and ``d<grad, vector>/d inputs``, as ``curvature``; the graph is freed."""
        sources = [*self.params.values(), *self.inputs.values()]
        cotangents = [vector[name] for name in self.grads]
        second = derivative(list(self.grads.values()), cotangents, sources)
        return _split(second, self.params, self.inputs)


def derivative(
    outputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    inputs: Sequence[Tensor],
    create_graph: bool = False,
) -> list[Tensor]:
    """``torch.autograd.grad`` with zeros for inputs on which no output depends."""
    pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    if not pairs:
        return [torch.zeros_like(tensor) for tensor in inputs]
    grads = torch.autograd.grad(
        [output for output, _ in pairs],
        list(inputs),
        [cotangent for _, cotangent in pairs],
        create_graph=create_graph,
        materialize_grads=True,
    )
    return list(grads)


def pullback(fn: Callable[[Any], Any], at: Any) -> tuple[Any, Callable[[Any], Any]]:
    """``fn(at)``, and the product of a cotangent with the derivative there, as a function."""
    value, pull = vjp(fn, at)[:2]
    return value, lambda cotangent: pull(cotangent)[0]


def tangent(gradients: Callable[[Any], Any], params: Any, vector: Any) -> tuple[Any, Any]:
    """Forward over reverse: ``gradients(params)`` and its tangent along ``vector``.

    ``gradients`` is a ``grad`` of a ``vmap``, so that the transforms nest as jvp(grad(vmap)).
    """
    # Under vmap(jvp(grad)) PyTorch 2.13 writes into immutable zero tangents, and jvp(vmap(grad))
    # silently drops the tangent of the statistics that a normalisation layer saves.
    dense = tree_map(Tensor.contiguous, (params, vector))
    # Dynamo traces no mode here, and has no such tangents.
    with nullcontext() if torch.compiler.is_compiling() else _MseInSteps():
        value, along, *_ = jvp(gradients, dense[:1], dense[1:])
    return value, along


class _MseInSteps(TorchFunctionMode):
    """Mode for forward derivatives, in which the mean squared error is a chain of plain ops.

    The tangent of PyTorch's own gradient of it writes into an immutable zero, and raises.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        is_mse = func is F.mse_loss
        result: Any = _mse_in_steps(*args, **(kwargs or {})) if is_mse else NotImplemented
        return func(*args, **(kwargs or {})) if result is NotImplemented else result


def _mse_in_steps(
    input: Tensor, target: Tensor, *args: Any, reduction: str = "mean", **others: Any
) -> Tensor:
    # Weights and old names of the reduction stay with PyTorch, and what it warns of or refuses.
    is_plain = not args and all(value is None for value in others.values())
    if not is_plain or input.shape != target.shape or reduction not in ("none", "mean", "sum"):
        return NotImplemented
    squares = (input - target).square()
    return squares if reduction == "none" else getattr(squares, reduction)()


def central_difference(
    gradients: Callable[[Any], Any], params: Any, vector: Any
) -> tuple[Any, Any]:
    """``gradients(params)`` and its tangent along ``vector``, both from two shifted gradients.

    Both gradients draw the same random numbers.
    """
    leaves, directions = tree_flatten(params)[0], tree_flatten(vector)[0]
    # Truncation grows with the square of the shift, and rounding with its inverse. A shift of
    # cbrt(machine epsilon) relative to the parameters balances them.
    length, unit = _norm(directions), torch.finfo(leaves[0].dtype).eps ** (1 / 3)
    shift = torch.where(length > 0, unit * (1 + _norm(leaves)) / length, 1.0)

    def shifted(sign: float) -> Any:
        return tree_map(lambda p, v: p + sign * _per_task(shift, v) * v, params, vector)

    random = RandomState(leaves[0].device)
    above = gradients(shifted(1.0))
    with random.replay():
        below = gradients(shifted(-1.0))
    middle = tree_map(lambda a, b: (a + b) / 2, above, below)
    return middle, tree_map(lambda a, b: (a - b) / (2 * _per_task(shift, a)), above, below)


def _leaves(tensors: Tensors) -> Tensors:
    return {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}


def _split(grads: Sequence[Tensor], params: Tensors, inputs: Tensors) -> tuple[Tensors, Tensors]:
    """Gradients to the parameters and to the inputs, by name."""
    count = len(params)
    return (
        dict(zip(params, grads[:count], strict=True)),
        dict(zip(inputs, grads[count:], strict=True)),
    )


def _norm(leaves: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of each task's leaves ``[T]``."""
    rows = [leaf.reshape(leaf.shape[0], math.prod(leaf.shape[1:])) for leaf in leaves]
    return torch.stack([row.square().sum(1) for row in rows]).sum(0).sqrt()


def _per_task(values: Tensor, like: Tensor) -> Tensor:
    """Values ``[T]`` in a shape that broadcasts over ``like`` ``[T, ...]``."""
    return values.reshape(-1, *[1] * (like.ndim - 1))
