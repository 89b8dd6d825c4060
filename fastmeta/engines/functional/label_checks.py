"""Checks of class labels against a module's outputs, before a loss reads them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmeta.core.cuda_graphs import is_being_captured
from fastmeta.engines.base import Loss

_DEFAULT_IGNORE_INDEX = -100


def with_checked_labels(loss: Loss, labels: Tensor, name: str) -> Loss:
    """Make a classification loss raise for a label without a class; other losses are unchanged.

    On CUDA a wrong label would otherwise fail a device-side assertion, which ends the CUDA context.
    The labels are read once, here. On CUDA this waits for the device, so it is left out while a
    CUDA graph is captured.

    Args:
        loss: ``F.cross_entropy``, ``F.nll_loss``, their modules, or any other loss.
        labels: the targets of all tasks ``[T, S, ...]``.
        name: the argument's name in the error.

    Raises:
        TypeError: integer labels that are not int64.
        ValueError: raised by the loss that is returned, for a label outside ``0..N-1``.
    """
    if not _takes_classes(loss) or labels.is_floating_point() or labels.numel() == 0:
        return loss
    if labels.dtype != torch.int64:
        raise TypeError(f"{name}: expected int64 class labels, got {labels.dtype}")
    if is_being_captured(labels):
        return loss
    ignored = labels == getattr(loss, "ignore_index", _DEFAULT_IGNORE_INDEX)
    # Both numbers in one transfer from the device.
    lowest, highest = torch.stack(labels.masked_fill(ignored, 0).aminmax()).tolist()

    def checked(outputs: Tensor, targets: Tensor) -> Tensor:
        # Here, as only the outputs tell the number of classes; under vmap the dimension B leads.
        classes = outputs.shape[1 if outputs.ndim > 1 else 0]
        if lowest < 0 or highest >= classes:
            raise ValueError(
                f"{name}: expected labels in 0..{classes - 1}, as the module gives {classes} "
                f"outputs, got labels from {lowest} to {highest}"
            )
        return loss(outputs, targets)

    return checked


def _takes_classes(loss: Loss) -> bool:
    classification = (nn.CrossEntropyLoss, nn.NLLLoss)
    return loss in (F.cross_entropy, F.nll_loss) or isinstance(loss, classification)
