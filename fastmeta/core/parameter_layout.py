"""The parameters of a task as one flat vector: a layout, and views into it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from fastmeta.core.dtypes import accumulation_dtype


@dataclass(frozen=True)
class ParameterLayout:
    """Where each trainable parameter of a module lies in an arena ``[..., P]``.

    Only parameters with ``requires_grad=True`` are in it; one that is registered under several
    names (tied weights) is in it once, under its first name.

    Attributes:
        names: names of the L parameters, in the module's order.
        shapes: their shapes.
        dtype, device: shared by all of them.

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

    @classmethod
    def of(cls, module: nn.Module) -> ParameterLayout:
        """The layout of a module's trainable parameters.

        Args:
            module: any module.

        Raises:
            TypeError: ``module`` is no module, or its trainable parameters have several dtypes.
            ValueError: nothing is trainable, a parameter is not initialised yet (lazy modules), or
                the trainable parameters lie on several devices.
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
        dtypes = {p.dtype for p in named.values()}
        if len(dtypes) > 1:
            raise TypeError(f"module: expected trainable parameters of one dtype, got {dtypes}")
        devices = {p.device for p in named.values()}
        if len(devices) > 1:
            raise ValueError(f"module: expected trainable parameters on one device, got {devices}")
        shapes = tuple(p.shape for p in named.values())
        return cls(tuple(named), shapes, dtypes.pop(), devices.pop())

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
        # One split, not one slice per parameter: its derivative is a single concatenation.
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

    def step_size_array(self, lr: float | Tensor, tasks: int, steps: int) -> Tensor:
        """A step size in the one form that both engines take.

        Args:
            lr: a number; a tensor ``[]`` or ``[1]``; one number a parameter ``[L]``; one an element
                ``[P]``; one row a task ``[T, 1]``, ``[T, L]`` or ``[T, P]``; or one matrix a step,
                ``[K, T, P]`` where each of the three may be 1 and the last may be L.
            tasks: T.
            steps: K.

        Returns:
            ``[K or 1, T or 1, P or 1]``, differentiable in ``lr``; 1 where one step size serves
            all. A number comes in the precision in which updates are computed (float32 for half
            precision), a tensor in its own. Where L equals P every parameter has one element, and
            both readings agree.

        Raises:
            TypeError: ``lr`` is no number or tensor, or its dtype is not the parameters'.
            ValueError: it has another shape, or lies on another device.

        Example:
            >>> import torch
            >>> layout = ParameterLayout.of(torch.nn.Linear(3, 2))
            >>> layout.step_size_array(0.1, tasks=4, steps=5).shape
            torch.Size([1, 1, 1])
            >>> layout.step_size_array(torch.rand(5, 1, 2), tasks=4, steps=5).shape
            torch.Size([5, 1, 8])
        """
        if isinstance(lr, (int, float)) and not isinstance(lr, bool):
            dtype = accumulation_dtype(self.dtype)
            return torch.full((1, 1, 1), float(lr), dtype=dtype, device=self.device)
        if not isinstance(lr, Tensor):
            raise TypeError(f"lr: expected a number or a tensor, got {type(lr).__name__}")
        if lr.dtype != self.dtype:
            raise TypeError(f"lr: expected dtype {self.dtype}, got {lr.dtype}")
        if lr.device != self.device:
            raise ValueError(f"lr: expected device {self.device}, got {lr.device}")
        if lr.ndim <= 1 and lr.numel() == 1:
            return lr.reshape(1, 1, 1)
        self._check_step_size_shape(lr, tasks, steps)
        array = lr.reshape((1,) * (3 - lr.ndim) + lr.shape)
        return array if lr.shape[-1] in (1, self.numel) else self._repeat_over_elements(array)

    def _check_step_size_shape(self, lr: Tensor, tasks: int, steps: int) -> None:
        parameters, elements = len(self.names), self.numel
        a_step = [(k, t) for k in (1, steps) for t in (1, tasks)]
        of_dims: dict[int, Sequence[tuple[int, ...]]] = {1: [()], 2: [(tasks,)], 3: a_step}
        leads = of_dims.get(lr.ndim, [])
        if lr.shape[:-1] not in leads or lr.shape[-1] not in (1, parameters, elements):
            raise ValueError(
                f"lr: expected a number or shape [], [L], [P], [T, 1], [T, L], [T, P] or, with one "
                f"matrix a step, [K, 1 or T, 1 or L or P] with L = {parameters}, P = {elements}, "
                f"T = {tasks}, K = {steps}; got {list(lr.shape)}"
            )

    def _repeat_over_elements(self, array: Tensor) -> Tensor:
        """One number a parameter ``[..., L]`` -> one an element ``[..., P]``."""
        lead, columns = array.shape[:-1], array.split(1, dim=-1)
        pieces = [c.expand(*lead, size) for c, size in zip(columns, self.sizes, strict=True)]
        return torch.cat(pieces, dim=-1)
