"""Another batch of the support at each inner step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastmeta.core.checks import check_dense
from fastmeta.core.trees import check_tree, first_tensor, map_tensors
from fastmeta.engines.base import Examples

PER_STEP = "per_step"


@dataclass(frozen=True)
class Minibatches:
    """The batch of B examples that each of K inner steps sees.

    A step takes its batch from the support when it comes to it, so that no more than one batch is
    ever copied. Weights of the support are weights of the batches, ``[T, K, B]``, in both forms.

    Attributes:
        indices: int64, the examples of each step: ``[K, B]`` in every task, or ``[T, K, B]``. None:
            the support holds the batches, ``[T, K, B, ...]``.
    """

    indices: Tensor | None = None

    @classmethod
    def of(cls, inner_batches: Any, steps: int, support: Examples) -> Minibatches | None:
        """Read ``inner_batches`` as users write it, see ``fastmeta.MAML.meta_loss``; None for None.

        Raises:
            TypeError: neither int64 indices nor a string.
            ValueError: another string, no steps, a support or indices of another shape, or indices
                out of range.
        """
        if inner_batches is None:
            return None
        if steps == 0:
            raise ValueError("inner_batches: expected None, as there are no steps")
        check_tree(support.x_name, support.x)
        check_tree(support.y_name, support.y)
        for name, tensor in support.named().items():
            check_dense(name, tensor)
        if isinstance(inner_batches, str):
            return cls._per_step(inner_batches, steps, support)
        indices = _checked_indices(inner_batches, steps, support)
        leading = first_tensor(support.x).shape[:2]
        for name, tensor in support.named().items():
            if tensor.shape[:2] != leading:
                expected = ", ".join(map(str, leading))
                raise ValueError(
                    f"{name}: expected shape [{expected}, ...], got {list(tensor.shape)}"
                )
        return cls(indices)

    @classmethod
    def _per_step(cls, inner_batches: str, steps: int, support: Examples) -> Minibatches:
        if inner_batches != PER_STEP:
            raise ValueError(
                f"inner_batches: expected indices or {PER_STEP!r}, got {inner_batches!r}"
            )
        x = first_tensor(support.x)
        expected = list(x.shape[:3]) if x.ndim > 2 else ["T", steps, "B"]
        for name, tensor in support.named().items():
            fits = tensor.ndim > 2 and tensor.shape[1] == steps and 0 not in tensor.shape[:3]
            if not (fits and tensor.shape[:3] == x.shape[:3]):
                shown = ", ".join(map(str, [expected[0], steps, *expected[2:]]))
                raise ValueError(
                    f"{name}: expected shape [{shown}, ...], a batch for each of {steps} steps "
                    f"(inner_batches={PER_STEP!r}), got {list(tensor.shape)}"
                )
        return cls()

    @property
    def leading(self) -> int:
        """Leading dimensions of the support's tensors that no single example has."""
        return 3 if self.indices is None else 2

    def at(self, k: int, support: Examples) -> Examples:
        """The examples that step k sees, ``[T, B, ...]``."""
        x, y, role, weight = support
        weight = None if weight is None else weight[:, k]

        def taken(tensor: Tensor) -> Tensor:
            return self._taken(k, tensor)

        return Examples(map_tensors(taken, x), map_tensors(taken, y), role, weight)

    def add(self, k: int, name: str, grad: Tensor, total: Tensor) -> None:
        """Add the gradient of step k's batch to the gradient of the support's tensor of a name.

        ``total`` is contiguous. An example that the step saw twice gets both of its gradients.
        """
        if self.indices is None or name == "support_weight":
            total[:, k] += grad
        elif self.indices.ndim == 2:
            total.index_add_(1, self.indices[k], grad)
        else:
            tasks, examples, *rest = total.shape
            first = examples * torch.arange(tasks, device=total.device).unsqueeze(1)
            rows = (first + self.indices[:, k]).flatten()
            # Views, which raise instead of copying: what is added must reach the total.
            total.view(-1, *rest).index_add_(0, rows, grad.flatten(0, 1))

    def of_weights(self, weight: Tensor) -> Tensor:
        """Weights of the examples of the support as weights of the batches ``[T, K, B]``."""
        if self.indices is None:
            return weight
        if self.indices.ndim == 2:
            return weight[:, self.indices]
        tasks = torch.arange(len(weight), device=weight.device).view(-1, 1, 1)
        return weight[tasks, self.indices]

    def of_tasks(self, tasks: slice) -> Minibatches:
        """The batches of some of the tasks."""
        if self.indices is None or self.indices.ndim == 2:
            return self
        return Minibatches(self.indices[tasks])

    def _taken(self, k: int, tensor: Tensor) -> Tensor:
        if self.indices is None:
            return tensor[:, k]
        if self.indices.ndim == 2:
            return tensor[:, self.indices[k]]
        tasks = torch.arange(len(tensor), device=tensor.device).unsqueeze(1)
        return tensor[tasks, self.indices[:, k]]


def seen_first(support: Examples, batches: Minibatches | None) -> Examples:
    """What the first step sees of the support; its shapes are the shapes that every step sees."""
    return support if batches is None else batches.at(0, support)


def _checked_indices(indices: Any, steps: int, support: Examples) -> Tensor:
    """The indices on the device of the support."""
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64:
        got = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
        raise TypeError(f"inner_batches: expected an int64 tensor or {PER_STEP!r}, got {got}")
    check_dense("inner_batches", indices)
    x = first_tensor(support.x)
    tasks, examples = x.shape[:2] if x.ndim > 1 else (0, 0)
    leading = {2: (steps,), 3: (tasks, steps)}.get(indices.ndim)
    if leading is None or indices.shape[:-1] != leading or indices.shape[-1] == 0:
        raise ValueError(
            f"inner_batches: expected shape [K, B] or [T, K, B] with T = {tasks}, K = {steps} and "
            f"at least one example, got {list(indices.shape)}"
        )
    # Both numbers in one transfer from the device.
    low, high = torch.stack(indices.aminmax()).tolist() if indices.numel() else (0, -1)
    if low < 0 or high >= examples:
        raise ValueError(
            f"inner_batches: expected examples from 0 to {examples - 1}, got {low} to {high}"
        )
    return indices.to(x.device)
