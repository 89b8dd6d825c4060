"""Checks of the engines' arguments: step weights, arenas and examples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from fastmeta.core.checks import check_dense
from fastmeta.core.parameter_layout import ParameterLayout
from fastmeta.core.trees import check_tree, named_tensors
from fastmeta.engines.base import Examples


def read_step_weights(weights: Sequence[float] | Tensor | None, steps: int) -> list[float]:
    """The weights w_1 .. w_K of the query losses as numbers; an empty list for None.

    Raises:
        TypeError: ``weights`` is neither a sequence of numbers nor a tensor.
        ValueError: not K weights, a weight that is not finite, or no steps.
    """
    if weights is None:
        return []
    expected = f"step_weights: expected {steps} finite numbers, one a step"
    if steps == 0:
        raise ValueError(f"step_weights: expected None, as there are no steps, got {weights!r}")
    if isinstance(weights, Tensor):
        if weights.ndim != 1:
            raise ValueError(f"{expected}, got shape {list(weights.shape)}")
        weights = weights.tolist()  # read once, here: on CUDA this waits for the device
    numbers = isinstance(weights, Sequence) and all(isinstance(w, (int, float)) for w in weights)
    if not numbers:
        raise TypeError(f"{expected}, got {weights!r}")
    if len(weights) != steps or not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"{expected}, got {list(weights)}")
    return [float(weight) for weight in weights]


def check_arena(name: str, layout: ParameterLayout, arena: Tensor, tasks: int) -> None:
    """Raise unless ``arena`` is ``[P]`` or ``[T, P]`` of the layout's dtype and device."""
    _check_shape(name, arena, [layout.numel], [tasks, layout.numel])
    _check_kind(name, layout, arena)


def check_vector(name: str, layout: ParameterLayout, vector: Tensor, tasks: int) -> None:
    """Raise unless ``vector`` is one vector, as for ``check_arena``, or many, ``[K, T, P]``."""
    many = [len(vector), tasks, layout.numel] if getattr(vector, "ndim", 0) == 3 else []
    _check_shape(name, vector, [layout.numel], [tasks, layout.numel], many)
    _check_kind(name, layout, vector)


def _check_shape(name: str, tensor: Tensor, *shapes: list[int]) -> None:
    """Raise unless ``tensor`` has one of the shapes; an empty list is none."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    expected = [shape for shape in shapes if shape]
    if list(tensor.shape) not in expected:
        raise ValueError(
            f"{name}: expected shape {' or '.join(map(str, expected))}, got {list(tensor.shape)}"
        )


def _check_kind(name: str, layout: ParameterLayout, arena: Tensor) -> None:
    if arena.dtype != layout.dtype:
        raise TypeError(f"{name}: expected dtype {layout.dtype}, got {arena.dtype}")
    if arena.device != layout.device:
        raise ValueError(f"{name}: expected device {layout.device}, got {arena.device}")


def check_examples(layout: ParameterLayout, *sets: Examples) -> int:
    """Check sets of examples of the same tasks; returns the number of tasks.

    Raises:
        TypeError: no tensor, or inputs of another floating-point dtype than the parameters.
        ValueError: no tasks or no examples, different numbers of them, or another device.
    """
    for examples in sets:
        for name, tree in ((examples.x_name, examples.x), (examples.y_name, examples.y)):
            check_tree(name, tree)
            for path, tensor in named_tensors(name, tree).items():
                _check_tensor(path, tensor, layout, in_tree=not isinstance(tree, Tensor))
    tasks = sets[0].tasks
    for examples in sets:
        _check_sizes(examples, tasks)
        if examples.weight is not None:
            _check_weight(examples, (tasks, examples.size), layout)
        _check_inputs(examples, layout)
    return tasks


def _check_sizes(examples: Examples, tasks: int) -> None:
    """Raise unless all tensors have T tasks and, in no tree, B examples."""
    in_tree = not (isinstance(examples.x, Tensor) and isinstance(examples.y, Tensor))
    expected = [tasks] if in_tree else [tasks, examples.size]
    for name, tree in ((examples.x_name, examples.x), (examples.y_name, examples.y)):
        for path, tensor in named_tensors(name, tree).items():
            if list(tensor.shape[: len(expected)]) != expected:
                sizes = ", ".join(map(str, expected))
                raise ValueError(f"{path}: expected shape [{sizes}, ...], got {list(tensor.shape)}")


def _check_inputs(examples: Examples, layout: ParameterLayout) -> None:
    """TypeError for a floating-point input of another dtype than the parameters."""
    # Integer inputs, such as token ids of an embedding, have no dtype to agree on.
    dtypes = {layout.dtype, *layout.frozen_dtypes}
    # Under autocast the module itself brings its inputs to one dtype.
    if torch.is_autocast_enabled(layout.device.type):
        return
    for name, x in named_tensors(examples.x_name, examples.x).items():
        if x.is_floating_point() and x.dtype not in dtypes:
            raise TypeError(f"{name}: expected dtype {layout.dtype}, got {x.dtype}")


def _check_weight(examples: Examples, shape: tuple[int, int], layout: ParameterLayout) -> None:
    name, weight = examples.weight_name, cast("Tensor", examples.weight)
    check_dense(name, weight)
    if weight.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(weight.shape)}")
    _check_kind(name, layout, weight)


def _check_tensor(name: str, tensor: Tensor, layout: ParameterLayout, in_tree: bool) -> None:
    check_dense(name, tensor)
    if in_tree and (tensor.ndim < 1 or len(tensor) == 0):
        raise ValueError(
            f"{name}: expected shape [T, ...] with at least one task, got {list(tensor.shape)}"
        )
    if not in_tree and (tensor.ndim < 2 or 0 in tensor.shape[:2]):
        raise ValueError(
            f"{name}: expected shape [T, examples, ...] with at least one task and one "
            f"example, got {list(tensor.shape)}"
        )
    if tensor.device != layout.device:
        raise ValueError(f"{name}: expected device {layout.device}, got {tensor.device}")
