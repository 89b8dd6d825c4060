"""Hessian-vector products of many tasks at once, in three modes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, overload

import torch
from torch import Tensor
from torch.func import grad, jvp, vjp
from torch.utils._pytree import tree_flatten, tree_map

from fastmeta._replay import RandomState
from fastmeta._stateless import differentiable_kernels, map_tasks, under_derivative

MODES = ("reverse", "forward", "finite_difference")

Tree = TypeVar("Tree")

# Parameters and inputs of all tasks by name, tensors [T, ...].
Tensors = dict[str, Tensor]
# The summed loss of all tasks. As tasks do not mix, its derivatives are each task's own.
Total = Callable[[Tensors, Tensors], Tensor]


@overload
def hvp(
    loss_fn: Callable[..., Tensor],
    params: Tensor,
    vector: Tensor,
    *batch: Tensor,
    mode: str = "reverse",
) -> Tensor: ...


@overload
def hvp(
    loss_fn: Callable[..., Tensor],
    params: Tree,
    vector: Any,
    *batch: Tensor,
    mode: str = "reverse",
) -> Tree: ...


def hvp(
    loss_fn: Callable[..., Tensor],
    params: Any,
    vector: Any,
    *batch: Tensor,
    mode: str = "reverse",
) -> Any:
    """Hessian-vector product ``H v`` of each task's loss (Pearlmutter 1994).

    ``H`` is the Hessian of ``loss_fn`` at ``params``; it is never formed. Tasks are vmapped.

    - ``reverse``: derivative of ``<grad, v>``. The fastest, and itself differentiable.
    - ``forward``: tangent of the gradient. Exact too; keeps no graph of the gradient's graph. Not
      for GRU and LSTM on CUDA, whose cells have no forward derivative in PyTorch.
    - ``finite_difference``: ``(g(theta + e v) - g(theta - e v)) / 2e`` with
      ``e = cbrt(machine epsilon) (1 + |theta|) / |v|`` for each task. The memory of a gradient;
      right to about 1e-9 in float64 and 1e-4 in float32 where the loss is smooth.

    It works inside ``torch.func`` transforms, and its result is differentiable in ``params``,
    ``vector`` and ``batch`` wherever PyTorch has the derivatives. Attention runs on kernels that
    have them; for recurrent layers on CUDA switch cuDNN off (``torch.backends.cudnn.enabled``).

    Args:
        loss_fn: ``loss_fn(params_of_one_task, *batch_of_one_task)`` -> scalar; pure.
        params: a tree (tensor, or dicts, lists and tuples of them) of ``[T, ...]``.
        vector: the same tree, shapes and dtypes as ``params``.
        *batch: tensors ``[T, ...]``.
        mode: ``"reverse"``, ``"forward"`` or ``"finite_difference"``.

    Returns:
        The tree of ``H v``, shapes as ``params``. No tasks give an empty result.

    Raises:
        TypeError: a leaf or a batch entry that is no tensor, or dtypes that differ.
        ValueError: an unknown mode, trees, shapes or devices that do not match, different numbers
            of tasks, or a loss that is no scalar.

    Example:
        >>> import torch
        >>> curvature = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> def loss(theta, a):
        ...     return 0.5 * (a * theta**2).sum()
        >>> hvp(loss, torch.zeros(2, 2), torch.ones(2, 2), curvature)
        tensor([[1., 2.],
                [3., 4.]])
    """
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {MODES}, got {mode!r}")
    tasks = _check_trees(params, vector, batch)
    if tasks == 0:
        return tree_map(torch.zeros_like, params)

    def scalar_loss(params: Any, *batch: Tensor) -> Tensor:
        value = loss_fn(params, *batch)
        if not isinstance(value, Tensor) or value.ndim != 0:
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"loss_fn: expected a scalar tensor, got {got}")
        return value

    def task_loss(params: Any, *batch: Tensor) -> Tensor:
        return under_derivative(lambda p: scalar_loss(p, *batch), params)

    def total(params: Any) -> Tensor:
        return map_tasks(task_loss, params, *batch).sum()

    with differentiable_kernels():
        if mode == "reverse":
            return vjp(grad(total), params)[1](vector)[0]
        if mode == "forward":
            return tangent(grad(total), params, vector)[1]
        return central_difference(grad(total), params, vector)[1]


def curvature(
    total: Total, params: Tensors, vector: Tensors, inputs: Tensors, mode: str
) -> tuple[Tensors, Tensors]:
    """Hessian-vector product, and the derivative of ``<grad, vector>`` to the inputs.

    What one step of the adjoint recursion needs, outside ``torch.func`` transforms and without a
    graph of the result.

    Args:
        total: the summed loss of all tasks as a function of parameters and inputs.
        params, vector: name -> ``[T, ...]``.
        inputs: name -> ``[T, ...]``, those whose derivative is wanted.
        mode: as for ``hvp``.

    Returns:
        ``(H vector, d<g, vector>/d inputs)``, each by name.
    """
    if mode == "reverse":
        return _pull_back(total, params, vector, inputs)
    if mode == "forward":
        both = grad(total, argnums=(0, 1))
        return tangent(lambda p: both(p, inputs), params, vector)[1]
    return central_difference(lambda p: gradient(total, p, inputs), params, vector)[1]


def gradient(total: Total, params: Tensors, inputs: Tensors) -> tuple[Tensors, Tensors]:
    """Gradient of the summed loss to parameters and inputs, keeping no graph."""
    params, inputs = _leaves(params), _leaves(inputs)
    with torch.enable_grad():
        value = total(params, inputs)
    grads = derivative([value], [torch.ones_like(value)], [*params.values(), *inputs.values()])
    return _split(grads, params, inputs)


def derivative(
    outputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    inputs: Sequence[Tensor],
    create_graph: bool = False,
) -> list[Tensor]:
    """``torch.autograd.grad`` with zeros where an output does not depend on an input."""
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


def tangent(gradients: Callable[[Any], Any], params: Any, vector: Any) -> tuple[Any, Any]:
    """Forward over reverse: ``gradients(params)`` and its tangent along ``vector``.

    The transforms nest as jvp(grad(vmap)). Under vmap(jvp(grad)) PyTorch 2.13 writes into immutable
    zero tangents, and jvp(vmap(grad)) silently drops the tangent of the statistics that a
    normalisation layer saves.
    """
    dense = tree_map(torch.Tensor.contiguous, (params, vector))
    value, along, *_ = jvp(gradients, dense[:1], dense[1:])
    return value, along


def central_difference(
    gradients: Callable[[Any], Any], params: Any, vector: Any
) -> tuple[Any, Any]:
    """``gradients(params)`` and its tangent along ``vector``, both from two shifted gradients.

    Truncation grows with the square of the step and rounding with its inverse: a step of
    cbrt(machine epsilon) relative to the parameters balances them. Both gradients draw the same
    random numbers.
    """
    leaves, directions = tree_flatten(params)[0], tree_flatten(vector)[0]
    length, unit = _norm(directions), torch.finfo(leaves[0].dtype).eps ** (1 / 3)
    step = torch.where(length > 0, unit * (1 + _norm(leaves)) / length, 1.0)

    def shifted(sign: float) -> Any:
        return tree_map(lambda p, v: p + sign * _per_task(step, v) * v, params, vector)

    random = RandomState(leaves[0].device)
    above = gradients(shifted(1.0))
    with random.replay():
        below = gradients(shifted(-1.0))
    middle = tree_map(lambda a, b: (a + b) / 2, above, below)
    return middle, tree_map(lambda a, b: (a - b) / (2 * _per_task(step, a)), above, below)


def _pull_back(
    total: Total, params: Tensors, vector: Tensors, inputs: Tensors
) -> tuple[Tensors, Tensors]:
    params, inputs = _leaves(params), _leaves(inputs)
    parameters = list(params.values())
    with torch.enable_grad():
        value = total(params, inputs)
        grads = derivative([value], [torch.ones_like(value)], parameters, create_graph=True)
    cotangents = [vector[name] for name in params]
    second = derivative(grads, cotangents, [*parameters, *inputs.values()])
    return _split(second, params, inputs)


def _leaves(tensors: Tensors) -> Tensors:
    return {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}


def _split(grads: Sequence[Tensor], params: Tensors, inputs: Tensors) -> tuple[Tensors, Tensors]:
    count = len(params)
    return (
        dict(zip(params, grads[:count], strict=True)),
        dict(zip(inputs, grads[count:], strict=True)),
    )


def _norm(leaves: Sequence[Tensor]) -> Tensor:
    """Euclidean norm over all leaves, of each task ``[T]``."""
    rows = [leaf.reshape(leaf.shape[0], math.prod(leaf.shape[1:])) for leaf in leaves]
    return torch.stack([row.square().sum(1) for row in rows]).sum(0).sqrt()


def _per_task(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.ndim - 1))


def _check_trees(params: Any, vector: Any, batch: Sequence[Tensor]) -> int:
    leaves, tree = tree_flatten(params)
    directions, vector_tree = tree_flatten(vector)
    if not leaves:
        raise ValueError("params: expected at least one tensor, got an empty tree")
    if tree != vector_tree:
        raise ValueError(f"vector: expected the tree of params, {tree}, got {vector_tree}")
    for name, tensors in (("params", leaves), ("vector", directions), ("batch", batch)):
        for tensor in tensors:
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}: expected tensors, got {type(tensor).__name__}")
            if tensor.ndim == 0:
                raise ValueError(f"{name}: expected tensors [T, ...], got a scalar")
    for leaf, direction in zip(leaves, directions, strict=True):
        if leaf.shape != direction.shape:
            raise ValueError(
                f"vector: expected shape {list(leaf.shape)}, got {list(direction.shape)}"
            )
        if leaf.dtype != direction.dtype:
            raise TypeError(f"vector: expected dtype {leaf.dtype}, got {direction.dtype}")
        if leaf.device != direction.device:
            raise ValueError(f"vector: expected device {leaf.device}, got {direction.device}")
    tasks = leaves[0].shape[0]
    # One comparison a tensor: a set of sizes would fix them in a graph of torch.compile's.
    counts = [tensor.shape[0] for tensor in [*leaves, *batch]]
    if any(count != tasks for count in counts):
        raise ValueError(f"expected {tasks} tasks in every tensor, got {sorted(set(counts))}")
    return tasks
