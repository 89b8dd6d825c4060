"""A learned preconditioner in Kronecker form."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastmeta.core.parameter_layout import ParameterLayout
from fastmeta.rules.base import Rule, RuleWrapper, check_made_for
from fastmeta.rules.sgd import SGD


class MetaCurvature(RuleWrapper):
    """Gradients multiplied by learned matrices along each of their dimensions.

    Park & Oliva 2019 (arXiv 1902.03356): the gradient G of a convolution's weight, seen as
    ``[O, I, F]`` with ``F = kh kw``, becomes ``G x_3 M_f x_2 M_i x_1 M_o``, that of a linear
    layer's ``[O, I]`` becomes ``M_o G M_i'``, and that of a vector ``M_o g``. The matrices start as
    the identity, so that learning starts from the rule inside as it is.

    Args:
        module: the model, whose trainable parameters it is for.
        rule: what takes the step; None: plain ``SGD()``.

    Attributes:
        factors: for each trainable parameter its matrices, M_o first.

    Raises:
        TypeError, ValueError: naming the argument that does not fit; later, where the trainable
            parameters are no longer those that it was made for.

    Example:
        >>> import torch
        >>> import fastmeta as fm
        >>> net = fm.models.Conv4(8)
        >>> rule = fm.rules.MetaCurvature(net)
        >>> [list(matrix.shape) for matrix in rule.factors[0]]  # of a weight [8, 1, 3, 3]
        [[8, 8], [1, 1], [9, 9]]
        >>> maml = fm.MAML(net, 0.1, rule=rule)
    """

    def __init__(self, module: nn.Module, rule: Rule | None = None) -> None:
        super().__init__(SGD() if rule is None else rule)
        self._layout = layout = ParameterLayout.of(module)
        like: dict[str, Any] = {"dtype": layout.dtype, "device": layout.device}
        self.factors = nn.ModuleList(
            nn.ParameterList(torch.eye(size, **like) for size in _sizes(shape))
            for shape in layout.shapes
        )

    def check(self, layout: ParameterLayout) -> None:
        check_made_for(self._layout, layout, "MetaCurvature")
        super().check(layout)

    def transform_gradient(self, grads: Tensor) -> Tensor:
        views = self._layout.views(grads)
        of_each = cast("Iterable[nn.ParameterList]", self.factors)
        changed = {
            name: _multiplied(view, factors).view_as(view)
            for (name, view), factors in zip(views.items(), of_each, strict=True)
        }
        return self._layout.flatten(changed)


def _sizes(shape: torch.Size) -> tuple[int, ...]:
    """A parameter's dimensions as the matrices see them: O, I and all others as one."""
    if len(shape) < 3:
        return tuple(shape) or (1,)
    return (*shape[:2], math.prod(shape[2:]))


def _multiplied(grads: Tensor, factors: nn.ParameterList) -> Tensor:
    """The gradients ``[T, *shape]`` times each matrix along its dimension: ``[T, O, I, F]``."""
    result = grads.reshape(len(grads), *(len(matrix) for matrix in factors))
    for dim, matrix in enumerate(factors, start=1):
        result = torch.tensordot(result, matrix.to(result.dtype), dims=([dim], [1])).movedim(
            -1, dim
        )
    return result.contiguous()
