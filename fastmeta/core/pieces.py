"""An arena as the parameters' own tensors: what autograd gives, before it is joined."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmeta.core.dtypes import HALF
from fastmeta.core.parameter_layout import ParameterLayout


@dataclass(frozen=True)
class Pieces:
    """A gradient ``[T, P]`` in pieces, without a graph. Joining it would copy all of it.

    Attributes:
        layout: the layout of the arena.
        tensors: name -> ``[T, *shape]``.

    Example:
        >>> import torch
        >>> layout = ParameterLayout.of(torch.nn.Linear(3, 2))
        >>> grads = {"weight": torch.ones(4, 2, 3), "bias": torch.ones(4, 2)}
        >>> Pieces(layout, grads).descend(torch.zeros(4, 8), torch.full((1, 1), 0.5))[0]
        tensor([-0.5000, -0.5000, -0.5000, -0.5000, -0.5000, -0.5000, -0.5000, -0.5000])
    """

    layout: ParameterLayout
    tensors: Mapping[str, Tensor]

    def joined(self) -> Tensor:
        """The arena ``[T, P]``."""
        return self.layout.flatten(self.tensors)

    def descend(self, theta: Tensor, lr: Tensor) -> Tensor:
        """``theta - lr * self`` as an arena, for theta ``[T, P]`` and lr ``[T or 1, P or 1]``."""
        after = torch.empty(theta.shape, dtype=theta.dtype, device=theta.device)
        rates, before = self._rates(lr), self.layout.views(theta)
        for name, out in self.layout.views(after).items():
            torch.addcmul(before[name], rates[name], self.tensors[name], value=-1, out=out)
        return after

    def times(self, lr: Tensor) -> Pieces:
        """``lr * self``."""
        rates = self._rates(lr)
        return Pieces(self.layout, {n: rates[n] * x for n, x in self.tensors.items()})

    def minus(self, lr: Tensor, other: Pieces) -> Pieces:
        """``self - lr * other``."""
        rates, rest = self._rates(lr), other.tensors
        pieces = {n: torch.addcmul(x, rates[n], rest[n], value=-1) for n, x in self.tensors.items()}
        return Pieces(self.layout, pieces)

    def plus(self, other: Pieces) -> Pieces:
        """``self + other``."""
        return Pieces(self.layout, {n: x + other.tensors[n] for n, x in self.tensors.items()})

    def add_to(self, arena: Tensor) -> None:
        """Add in place to an arena ``[T, P]``, or the sum over the tasks to one ``[P]``."""
        for name, out in self.layout.views(arena).items():
            piece = self.tensors[name]
            out += piece.sum(0) if arena.ndim == 1 else piece

    def _rates(self, lr: Tensor) -> dict[str, Tensor]:
        if lr.shape[-1] != 1:
            return self.layout.views(lr)
        names, shapes = self.layout.names, self.layout.shapes
        return {n: lr.view(-1, *[1] * len(s)) for n, s in zip(names, shapes, strict=True)}


# A gradient [T, P], joined or not.
Gradient = Tensor | Pieces


def joined(gradient: Gradient) -> Tensor:
    """The gradient as an arena ``[T, P]``."""
    return gradient.joined() if isinstance(gradient, Pieces) else gradient


def add_gradients(a: Gradient, b: Gradient) -> Gradient:
    """Their sum, in pieces if both are."""
    if isinstance(a, Pieces) and isinstance(b, Pieces):
        return a.plus(b)
    return joined(a) + joined(b)


def may_stay_in_pieces(gradient: Gradient) -> bool:
    """Whether plain steps of it need no arena. In half precision they take a wider type."""
    return isinstance(gradient, Pieces) and gradient.layout.dtype not in HALF
