"""A learned preconditioner in Kronecker form."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastmeta.core.parameter_layout import ParameterLayout
from fastmeta.core.parameter_selection import Selector, selected_names
from fastmeta.rules.base import Rule, RuleWrapper, check_made_for
from fastmeta.rules.sgd import SGD


class MetaCurvature(RuleWrapper):
    """Multiply gradients by learned matrices along each of their dimensions.

    Park & Oliva 2019 (arXiv 1902.03356). The gradient G of a convolution's weight, viewed as
    ``[O, I, F]`` with ``F = kh kw``, becomes ``G x_3 M_f x_2 M_i x_1 M_o``. The gradient of a
    linear layer's weight ``[O, I]`` becomes ``M_o G M_i'``, the gradient g of a vector ``M_o g``.
    The matrices start as the identity, so that learning starts from the rule inside.

    Args:
        module: the model with the parameters to adapt.
        rule: the rule that takes the step; None: plain ``SGD()``.
        adapt: the parameters to adapt, as for ``fastmeta.MAML``; None: all trainable ones.

    Attributes:
        factors: for each trainable parameter its matrices, M_o first.

    Raises:
        TypeError, ValueError: naming the argument that does not fit; in use, if the trainable
            parameters are not the module's any more.

    Example:
        >>> import torch
        >>> import fastmeta as fm
        >>> net = fm.models.Conv4(8)
        >>> rule = fm.rules.MetaCurvature(net)
        >>> [list(matrix.shape) for matrix in rule.factors[0]]  # of a weight [8, 1, 3, 3]
        [[8, 8], [1, 1], [9, 9]]
        >>> maml = fm.MAML(net, 0.1, rule=rule)
    """

    def __init__(
        self,
        module: nn.Module,
        rule: Rule | None = None,
        adapt: Selector | Sequence[Selector] | None = None,
    ) -> None:
        super().__init__(SGD() if rule is None else rule)
        self._layout = layout = ParameterLayout.of(module, selected_names(module, adapt))
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
        factor_lists = cast("Iterable[nn.ParameterList]", self.factors)
        transformed = {
            name: _multiplied(view, factors).view_as(view)
            for (name, view), factors in zip(views.items(), factor_lists, strict=True)
        }
        return self._layout.flatten(transformed)


def _sizes(shape: torch.Size) -> tuple[int, ...]:
    """Sizes of a parameter's matrices: O, I and the product of all other dimensions."""
    if len(shape) < 3:
        return tuple(shape) or (1,)
    return (*shape[:2], math.prod(shape[2:]))


def _multiplied(grads: Tensor, factors: nn.ParameterList) -> Tensor:
    """Product ``[T, O, I, F]`` of gradients ``[T, *shape]`` with each matrix along a dimension."""
    result = grads.reshape(len(grads), *(len(matrix) for matrix in factors))
    for dim, matrix in enumerate(factors, start=1):
        result = torch.tensordot(result, matrix.to(result.dtype), dims=([dim], [1])).movedim(
            -1, dim
        )
    return result.contiguous()
