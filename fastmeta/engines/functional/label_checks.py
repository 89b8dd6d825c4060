"""Checks of class labels against a module's outputs, before a loss reads them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmeta.core.cuda_graphs import is_being_captured
from fastmeta.core.trees import Tree
from fastmeta.engines.base import Loss

_DEFAULT_IGNORE_INDEX = -100
_OF_CLASSES = (nn.CrossEntropyLoss, nn.NLLLoss)
_OF_DIFFERENCES = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss)


def with_checked_labels(loss: Loss, labels: Tree, name: str) -> Loss:
    """Make PyTorch's losses raise for targets that do not fit; other losses are unchanged.

    A label without a class would otherwise fail a device-side assertion on CUDA, which ends the
    CUDA context. Targets ``[S]`` of outputs ``[S, 1]`` would be broadcast: every example compared
    with every other. Labels are read once, here. On CUDA this waits for the device, so it is left
    out while a CUDA graph is captured.

    Args:
        loss: the cross entropy or the squared, absolute or Huber error as functions or modules of
            PyTorch, or any other loss.
        labels: the targets of all tasks ``[T, S, ...]``.
        name: the argument's name in the error.

    Raises:
        TypeError: integer labels that are not int64.
        ValueError, TypeError: raised by the loss that is returned, for a label outside ``0..N-1``,
            and for targets of another shape than the outputs ask for.
    """
    if loss in (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss) or isinstance(
        loss, _OF_DIFFERENCES
    ):
        return _of_tensors(_with_equal_shapes(loss, _tensor(loss, labels, name), name), loss)
    if not (loss in (F.cross_entropy, F.nll_loss) or isinstance(loss, _OF_CLASSES)):
        return loss
    labels = _tensor(loss, labels, name)
    if labels.is_floating_point():
        return _of_tensors(_with_probabilities(loss, labels, name), loss)
    if labels.dtype != torch.int64:
        raise TypeError(f"{name}: expected int64 class labels, got {labels.dtype}; use long()")
    return _of_tensors(_with_labels(loss, labels, name), loss)


def _tensor(loss: Loss, labels: Tree, name: str) -> Tensor:
    if not isinstance(labels, Tensor):
        raise TypeError(
            f"{name}: expected a tensor, which {title(loss)} takes, got a {type(labels).__name__}"
        )
    return labels


def _of_tensors(checked: Loss, loss: Loss) -> Loss:
    """The checked loss, raising for outputs of a module that are no tensor."""

    def of_tensor(outputs: Tree, targets: Tensor) -> Tensor:
        if not isinstance(outputs, Tensor):
            raise TypeError(
                f"loss: {title(loss)} takes one tensor, and the module gives a "
                f"{type(outputs).__name__}; give a loss(outputs, targets) that takes what it needs"
            )
        return checked(outputs, targets)

    return of_tensor


def title(loss: Loss) -> str:
    """The name of a loss in errors."""
    return getattr(loss, "__name__", type(loss).__name__)


def _with_equal_shapes(loss: Loss, labels: Tensor, name: str) -> Loss:
    def checked(outputs: Tensor, targets: Tensor) -> Tensor:
        if outputs.shape != targets.shape:
            expected, got = ([len(labels), *x.shape] for x in (outputs, targets))
            raise ValueError(
                f"{name}: expected the shape of the outputs {expected}, got {got}"
                + ("; use unsqueeze(-1)" if expected == [*got, 1] else "")
            )
        return loss(outputs, targets)

    return checked


def _with_probabilities(loss: Loss, labels: Tensor, name: str) -> Loss:
    def checked(outputs: Tensor, targets: Tensor) -> Tensor:
        if outputs.shape != targets.shape:
            raise TypeError(
                f"{name}: expected int64 class labels, or probabilities of shape "
                f"{[len(labels), *outputs.shape]}, got {labels.dtype} of shape "
                f"{[len(labels), *targets.shape]}; use long() for labels"
            )
        return loss(outputs, targets)

    return checked


def _with_labels(loss: Loss, labels: Tensor, name: str) -> Loss:
    lowest = highest = 0
    if labels.numel() and not is_being_captured(labels):
        ignored = labels == getattr(loss, "ignore_index", _DEFAULT_IGNORE_INDEX)
        # Both numbers in one transfer from the device.
        lowest, highest = torch.stack(labels.masked_fill(ignored, 0).aminmax()).tolist()

    def checked(outputs: Tensor, targets: Tensor) -> Tensor:
        # Here, as only the outputs tell the number of classes; under vmap the dimension B leads.
        dim = 1 if outputs.ndim > 1 else 0
        shape = *outputs.shape[:dim], *outputs.shape[dim + 1 :]
        if targets.shape != shape:
            expected, got = [len(labels), *shape], [len(labels), *targets.shape]
            raise ValueError(
                f"{name}: expected class labels of shape {expected}, got {got}"
                + ("; use squeeze(-1)" if got == [*expected, 1] else "")
            )
        classes = outputs.shape[dim]
        if lowest < 0 or highest >= classes:
            raise ValueError(
                f"{name}: expected labels in 0..{classes - 1}, as the module gives {classes} "
                f"outputs, got labels from {lowest} to {highest}"
            )
        return loss(outputs, targets)

    return checked
