"""The parameters of a task as one flat vector, the arena: its layout, and views into it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]


@dataclass(frozen=True)
class ParameterLayout:
    """The places of a module's adapted parameters in an arena ``[..., P]``.

    Those are the trainable ones, or some of them. Parameters with ``requires_grad=False`` are left
    out. A parameter that is registered under several names (tied weights) is in the arena once,
    under its first name.

    Attributes:
        names: names of the L parameters, in the module's order.
        shapes: their shapes.
        dtype, device: shared by all of them.
        frozen_dtypes: floating-point dtypes of the parameters that are left out, which the module's
            inputs may have as well.

    Example:
        >>> import torch
        >>> layout = ParameterLayout.of(torch.nn.Linear(3, 2))
        >>> layout.names, layout.sizes, layout.numel
        (('weight', 'bias'), (6, 2), 8)
        >>> {name: tuple(view.shape) for name, view in layout.views(torch.zeros(4, 8)).items()}
        {'weight': (4, 2, 3), 'bias': (4, 2)}
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    dtype: torch.dtype
    device: torch.device
    frozen_dtypes: frozenset[torch.dtype] = field(default=frozenset(), compare=False)

    @classmethod
    def of(cls, module: nn.Module, adapt: Collection[str] | None = None) -> ParameterLayout:
        """The layout of a module's trainable parameters.

        Args:
            module: any module.
            adapt: the names of those that are in the arena, as from ``selected_names``; None: all.

        Raises:
            TypeError: ``module`` is no module, or the parameters of the arena have several dtypes.
            ValueError: nothing is trainable, a parameter is not initialised yet (lazy modules), or
                the parameters of the arena lie on several devices.
        """
        if not isinstance(module, nn.Module):
            raise TypeError(f"module: expected an nn.Module, got {type(module).__name__}")
        named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if not named:
            raise ValueError(f"module: {type(module).__name__} has no trainable parameter")
        for name, parameter in named.items():
            if isinstance(parameter, UninitializedTensorMixin):
                raise ValueError(
                    f"module: parameter {name!r} is not initialised; run the lazy module once first"
                )
        if adapt is not None:
            named = {name: p for name, p in named.items() if name in adapt}
            if not named:
                raise ValueError(f"adapt: none of {sorted(adapt)} is trainable any more")
        dtypes = {p.dtype for p in named.values()}
        if len(dtypes) > 1:
            raise TypeError(f"module: expected trainable parameters of one dtype, got {dtypes}")
        devices = {p.device for p in named.values()}
        if len(devices) > 1:
            raise ValueError(f"module: expected trainable parameters on one device, got {devices}")
        shapes = tuple(p.shape for p in named.values())
        frozen = {p.dtype for name, p in module.named_parameters() if name not in named}
        floating = frozenset(dtype for dtype in frozen if dtype.is_floating_point)
        return cls(tuple(named), shapes, dtypes.pop(), devices.pop(), floating)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of elements of each parameter ``[L]``."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def numel(self) -> int:
        """Number of elements of all parameters, P."""
        return sum(self.sizes)

    def views(self, arena: Tensor) -> dict[str, Tensor]:
        """The parameters in an arena, without a copy.

        Args:
            arena: ``[..., P]``, its last dimension contiguous.

        Returns:
            name -> ``[..., *shape]``.

        Raises:
            ValueError: the last dimension is not P.
        """
        if arena.ndim == 0 or arena.shape[-1] != self.numel:
            raise ValueError(f"arena: expected shape [..., {self.numel}], got {list(arena.shape)}")
        # A split, not a slice for each parameter: its derivative is a single concatenation.
        pieces = arena.split(self.sizes, dim=-1)
        lead = arena.shape[:-1]
        return {
            name: piece.view(lead + shape)
            for name, piece, shape in zip(self.names, pieces, self.shapes, strict=True)
        }

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The inverse of ``views``: parameters joined into one arena (a differentiable copy).

        Args:
            tensors: name -> ``[..., *shape]``; names that the layout lacks are ignored.

        Returns:
            ``[..., P]``.

        Raises:
            ValueError: a name is missing, or a shape does not fit.
        """
        missing = [name for name in self.names if name not in tensors]
        if missing:
            raise ValueError(f"tensors: expected a tensor for each of {missing}, got none")
        first = tensors[self.names[0]].shape
        lead = first[: len(first) - len(self.shapes[0])]
        pieces = []
        for name, shape, size in zip(self.names, self.shapes, self.sizes, strict=True):
            if tensors[name].shape != lead + shape:
                raise ValueError(
                    f"tensors: expected {name!r} of shape {list(lead + shape)}, "
                    f"got {list(tensors[name].shape)}"
                )
            pieces.append(tensors[name].reshape((*lead, size)))
        return torch.cat(pieces, dim=-1)
