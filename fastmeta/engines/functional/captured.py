"""Refusal of tensors that a module or a loss reads by itself, and whose gradient would be lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastmeta.core.captured import captured_leaves
from fastmeta.engines.base import Loss

# Set by learners that take a meta-gradient of their own, with gradients disabled around it.
taking_gradient: ContextVar[bool] = ContextVar("taking_gradient", default=False)


def would_lose_gradients() -> bool:
    """Whether a gradient is to be taken, so that one that is left out is lost."""
    return torch.is_grad_enabled() or taking_gradient.get()


@dataclass(frozen=True)
class CapturedNames:
    """The names under which a module and its losses may read tensors besides their arguments."""

    module: nn.Module
    losses: tuple[Loss, ...]

    def refuse_captured(self, value: Tensor, known: list[Tensor]) -> None:
        """ValueError if a loss depends on a tensor that requires a gradient and is not known."""
        leaves = captured_leaves(value, known)
        if not leaves:
            return
        name = self._name(leaves[0])
        raise ValueError(
            f"{name} requires a gradient and is no input of the inner loop, so its gradient would "
            "be lost: give it in outer=[...], or detach it"
        )

    def _name(self, tensor: Tensor) -> str:
        for name, parameter in self.module.named_parameters():
            if parameter is tensor:
                return (
                    f"loss: the module's parameter {name!r}, which it reads at its value before "
                    "adaptation,"
                )
        for name, value in self._attributes():
            if value is tensor:
                return f"{name}, a tensor of shape {list(tensor.shape)},"
        return f"a tensor of shape {list(tensor.shape)} that the module or the loss reads"

    def _attributes(self) -> Iterator[tuple[str, Any]]:
        for prefix, m in self.module.named_modules():
            for name, value in vars(m).items():
                yield ".".join(["model", *filter(None, [prefix]), name]), value
        for loss in self.losses:
            if isinstance(loss, nn.Module):
                for name, parameter in loss.named_parameters():
                    yield f"loss.{name}", parameter
            yield from _names_of_function(loss)


def _names_of_function(function: Any) -> Iterator[tuple[str, Any]]:
    """The variables of enclosing functions and the globals that a function reads."""
    code = getattr(function, "__code__", None)
    if code is None:
        return
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        yield f"{name} of loss", cell.cell_contents
    for name in code.co_names:
        yield f"{name} of loss", function.__globals__.get(name)
