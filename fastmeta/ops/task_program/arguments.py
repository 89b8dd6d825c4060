"""The arguments of the task program's longest ops, in the order of their schemas.

Callers pass them one by one, as the compiled ops take them. The fakes and the reference gather
them in one of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class AdaptBackwardArguments(NamedTuple):
    """Arguments of ``adapt_backward``; ``adapt`` takes the first seven and the weight."""

    code: Tensor
    theta: Tensor  # [P] or [T, P]
    frozen: Tensor  # [F]
    lr: Tensor  # [K or 1, T or 1, P or 1]
    x: Tensor  # [T, B, ...]
    y: Tensor
    steps: int
    grad_out: Tensor  # [T, P], the cotangent of theta_K
    first_order: bool
    keep: bool  # keep the steps' tensors instead of computing them again
    lr_grad: bool  # whether to compute the gradient to lr
    input_grad: bool  # whether to compute the gradient to x
    weight: Tensor | None = None  # [T, B], of the examples; none: as the loss's code says


class MetaGradientArguments(NamedTuple):
    """Arguments of ``meta_gradient``."""

    code: Tensor
    theta: Tensor  # [P] or [T, P]
    frozen: Tensor  # [F]
    lr: Tensor  # [K or 1, T or 1, P or 1]
    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor
    step_weights: Sequence[float]  # of the query losses after each step; empty: only the last one
    steps: int
    first_order: bool
    keep: bool  # keep the steps' tensors instead of computing them again
    gradient: bool  # whether to compute any gradient
    lr_grad: bool
    support_grad: bool
    query_grad: bool
    support_weight: Tensor | None = None  # [T, S]
    query_weight: Tensor | None = None  # [T, Q]
