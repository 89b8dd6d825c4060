"""Checks of class labels against a module's outputs, before a loss reads them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmeta.core.absence import ABSENT
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
    out while a CUDA graph is captured: a label without a class, and so one of an absent example,
    fails the assertion when the graph is replayed.

    A loss of class labels leaves absent examples out, see ``ClassLoss``.

    Args:
        loss: the cross entropy or the squared, absolute or Huber error as functions or modules of
            PyTorch, or any other loss. The cross entropy may be a ``functools.partial``.
        labels: the targets of all tasks ``[T, S, ...]``.
        name: the argument's name in the error.

    Raises:
        TypeError: integer labels that are not int64.
        ValueError, TypeError: raised by the loss that is returned, for a label outside ``0..N-1``
            that does not mark an absent example, and for targets of another shape than the outputs
            ask for.
    """
    if loss in (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss) or isinstance(
        loss, _OF_DIFFERENCES
    ):
        return _with_equal_shapes(loss, _tensor(loss, labels, name), name)
    ignored = _ignore_index(loss)
    if ignored is None:
        return loss
    labels = _tensor(loss, labels, name)
    if labels.is_floating_point():
        return _with_probabilities(loss, labels, name)
    if labels.dtype != torch.int64:
        raise TypeError(f"{name}: expected int64 class labels, got {labels.dtype}; use long()")
    return ClassLoss.of(loss, labels, name, ignored)


def _tensor(loss: Loss, labels: Tree, name: str) -> Tensor:
    if not isinstance(labels, Tensor):
        raise TypeError(
            f"{name}: expected a tensor, which {title(loss)} takes, got a {type(labels).__name__}"
        )
    return labels


def check_single_output(loss: Loss, outputs: Tree) -> None:
    """TypeError for outputs of a module that are no tensor, which a loss of PyTorch takes."""
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"loss: {title(loss)} takes one tensor, and the module gives a "
            f"{type(outputs).__name__}; give a loss(outputs, targets) that takes what it needs"
        )


def title(loss: Loss) -> str:
    """The name of a loss in errors."""
    return getattr(loss, "__name__", type(loss).__name__)


def _with_equal_shapes(loss: Loss, labels: Tensor, name: str) -> Loss:
    def checked(outputs: Tensor, targets: Tensor) -> Tensor:
        check_single_output(loss, outputs)
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
        check_single_output(loss, outputs)
        if outputs.shape != targets.shape:
            raise TypeError(
                f"{name}: expected int64 class labels, or probabilities of shape "
                f"{[len(labels), *outputs.shape]}, got {labels.dtype} of shape "
                f"{[len(labels), *targets.shape]}; use long() for labels"
            )
        return loss(outputs, targets)

    return checked


def present_examples(
    loss: Loss, labels: Tensor, weight: Tensor | None = None, dims: int = 1
) -> Tensor | None:
    """Whether each example is present, that is, has a label and a weight; None if all are.

    Args:
        loss: the result of ``with_checked_labels``.
        labels: ``[B, ...]``, or ``[T, B, ...]`` with ``dims=2``.
        weight: ``[B]`` or ``[T, B]``.
    """
    present = None if weight is None else weight.detach() != 0
    if not may_be_absent(loss):
        return present
    labelled = ~every_label(labels == ABSENT, dims).view(labels.shape[:dims])
    return labelled if present is None else present & labelled


def may_be_absent(loss: Loss) -> bool:
    """Whether an example of a checked loss may be absent for its label."""
    return isinstance(loss, ClassLoss) and loss.may_be_absent


def every_label(marked: Tensor, dims: int) -> Tensor:
    """Whether all labels of an example are marked, in ``[B, 1, ...]`` or ``[T, B, 1, ...]``."""
    if marked.ndim == dims:
        return marked
    shape = *marked.shape[:dims], *[1] * (marked.ndim - dims)
    return marked.flatten(dims).all(-1).view(shape)


def _ignore_index(loss: Any) -> int | None:
    """The label that a loss of class labels ignores; None for another loss."""
    options: Any = {}
    # Positional arguments of a partial would come before the outputs.
    if isinstance(loss, partial) and not loss.args:
        loss, options = loss.func, loss.keywords
    if isinstance(loss, _OF_CLASSES):
        return loss.ignore_index
    if loss not in (F.cross_entropy, F.nll_loss):
        return None
    return cast("int", options.get("ignore_index", _DEFAULT_IGNORE_INDEX))


@dataclass(frozen=True)
class ClassLoss:
    """A loss of int64 class labels that checks them, and leaves out absent examples.

    An example all of whose labels are -1 is absent. The loss is what it is without the example; it
    is 0 for a task without any.

    Attributes:
        loss: the loss of one task's outputs and labels.
        name: the argument's name in errors.
        tasks: T.
        ignored: the loss's ``ignore_index``.
        lowest, highest: of the labels that are neither absent nor ignored, and 0.
        may_be_absent: whether an example may be absent.
    """

    loss: Loss
    name: str
    tasks: int
    ignored: int
    lowest: int
    highest: int
    may_be_absent: bool

    @classmethod
    def of(cls, loss: Loss, labels: Tensor, name: str, ignored: int) -> ClassLoss:
        """The loss for the labels of all tasks ``[T, B, ...]``."""
        tasks = len(labels)
        if labels.numel() == 0 or is_being_captured(labels):
            return cls(loss, name, tasks, ignored, 0, 0, False)
        # Both numbers in one transfer from the device.
        extremes = labels.masked_fill(labels == ignored, 0).aminmax()
        lowest, highest = torch.stack(extremes).tolist()
        if lowest != ABSENT:
            return cls(loss, name, tasks, ignored, lowest, highest, False)
        left_out = every_label(labels == ABSENT, 2) | (labels == ignored)
        lowest = int(labels.masked_fill(left_out, 0).min())
        return cls(loss, name, tasks, ignored, lowest, highest, True)

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self._check(outputs, targets)
        if not self.may_be_absent:
            return self.loss(outputs, targets)
        absent = every_label(targets == ABSENT, 1)
        none = absent.all()
        targets = torch.where(absent, self.ignored, targets)
        # The mean over no example is NaN, and so is its gradient, which a product with 0 would
        # keep: such a task takes another loss, whose gradient is finite.
        outputs, targets = torch.where(none, 0.0, outputs), torch.where(none, 0, targets)
        return torch.where(none, 0.0, self.loss(outputs, targets))

    def of_one_example(self) -> Loss:
        """The loss of an example by itself, 0 if its label is ignored."""
        loss = replace(self, may_be_absent=True)

        def of_one(outputs: Tensor, targets: Tensor) -> Tensor:
            # A mean over ignored labels only is NaN.
            ignored = (targets == self.ignored).all()
            return loss(outputs, torch.where(ignored, ABSENT, targets))

        return of_one

    def _check(self, outputs: Tensor, targets: Tensor) -> None:
        check_single_output(self.loss, outputs)
        # Here, as only the outputs tell the number of classes; under vmap the dimension B leads.
        dim = 1 if outputs.ndim > 1 else 0
        shape = *outputs.shape[:dim], *outputs.shape[dim + 1 :]
        if targets.shape != shape:
            expected, got = [self.tasks, *shape], [self.tasks, *targets.shape]
            raise ValueError(
                f"{self.name}: expected class labels of shape {expected}, got {got}"
                + ("; use squeeze(-1)" if got == [*expected, 1] else "")
            )
        classes = outputs.shape[dim]
        if self.lowest < 0 or self.highest >= classes:
            raise ValueError(
                f"{self.name}: expected labels in 0..{classes - 1}, as the module gives {classes} "
                f"outputs, got labels from {self.lowest} to {self.highest}"
            )
