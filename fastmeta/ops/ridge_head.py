"""Ridge regression of every task in closed form, and its leave-one-out outputs."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from fastmeta.core.absence import ABSENT, is_readable, may_have_absent
from fastmeta.core.autocast import without_autocast
from fastmeta.core.checks import check_choice, check_dense, check_integer, check_number
from fastmeta.core.classes import count_classes
from fastmeta.core.dtypes import accumulation_dtype
from fastmeta.ops._checks import (
    check_dims,
    check_floating,
    check_labels,
    check_shape,
    check_together,
)
from fastmeta.ops._registration import is_native
from fastmeta.ops._ridge_autograd import RidgeOptions, ridge
from fastmeta.ops._ridge_reference import Problem, fit, left_out
from fastmeta.ops.reference import check_label_range

FORMS = ("auto", "primal", "dual")

_MOST_UNKNOWNS = 256  # of a system that the native kernels factorise well


@overload
def ridge_head(
    x: Tensor,
    targets: Tensor,
    l2: float | Tensor,
    *,
    num_classes: int | None = None,
    weight: Tensor | None = None,
    center: Tensor | None = None,
    bias: bool = True,
    form: str = "auto",
    loo: Literal[False] = False,
) -> tuple[Tensor, Tensor | None]: ...


@overload
def ridge_head(
    x: Tensor,
    targets: Tensor,
    l2: float | Tensor,
    *,
    num_classes: int | None = None,
    weight: Tensor | None = None,
    center: Tensor | None = None,
    bias: bool = True,
    form: str = "auto",
    loo: Literal[True],
) -> Tensor: ...


def ridge_head(
    x: Tensor,
    targets: Tensor,
    l2: float | Tensor,
    *,
    num_classes: int | None = None,
    weight: Tensor | None = None,
    center: Tensor | None = None,
    bias: bool = True,
    form: str = "auto",
    loo: bool = False,
) -> tuple[Tensor, Tensor | None] | Tensor:
    """Each task's linear head that minimises a ridge regression, in closed form.

        W, b = argmin sum_s w_s |W x_s + b - y_s|^2 + l2 |W - C|^2

    All tasks in one call, differentiable any number of times in x, floating-point targets, l2,
    weight and center. Native kernels give the head and its first derivatives, which reuse the
    Cholesky factor of its system; plain PyTorch gives the higher ones, the leave-one-out outputs,
    and systems of more than 256 unknowns. bfloat16 and float16 are computed in float32. Apply the
    head to queries with ``fm.task_linear(query, W, b)``.

    Args:
        x: features ``[T, S, D]``, or ``[S, D]`` for one task.
        targets: ``[T, S, N]`` like x; or int64 labels ``[T, S]`` in ``[0, N)``, which stand for 1
            at the label and 0 elsewhere, or -1 for an absent example.
        l2: factor of the squared length of W - C, at least 0: a number, a 0-d tensor, or ``[T]``.
        num_classes: N, of labels; None: the largest label + 1.
        weight: factor of each example's squared error ``[T, S]``, at least 0; 0 is absence. None:
            all are 1.
        center: C ``[T, N, D]``, or ``[N, D]`` for all tasks; None: 0.
        bias: whether there is a bias. ``l2`` does not shrink it.
        form: "primal" solves for D unknowns, "dual" for S; "auto" takes the fewer. The results
            differ by rounding.
        loo: return the leave-one-out outputs instead: for each example the output ``W x_s + b`` of
            the head that is fitted to the others. They cost no further fit:
            ``y_s - (y_s - W x_s - b) / (1 - h_s)``, with h the diagonal of the hat matrix.

    Returns:
        W ``[T, N, D]`` and b ``[T, N]`` or None; or with ``loo`` the outputs ``[T, S, N]``. Without
        a present example W is C, and b is 0.

    Raises:
        TypeError: inputs are not tensors of fitting dtypes, or an option has the wrong type.
        ValueError: shapes or devices do not agree, an option is unknown or out of range, a label
            is neither in range nor -1; or the system is singular, as with equal rows of x and an
            ``l2`` of 0. The CUDA kernel returns NaN for a singular system.

    Source: Bertinetto et al. 2019 (arXiv 1805.08136), equation 4, for the dual form; Allen 1974
    (Technometrics 16), for the leave-one-out outputs.

    Example:
        >>> import torch
        >>> import fastmeta as fm
        >>> x, y = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[1.0], [3.0], [5.0]])
        >>> weight, bias = fm.ridge_head(x, y, l2=0.0)
        >>> weight.round(decimals=3), bias.round(decimals=3)
        (tensor([[2.]]), tensor([1.]))
    """
    check_floating("x", x)
    check_dims("x", x, "[T, S, D]")
    check_dense("targets", targets)
    if weight is not None:
        check_dense("weight", weight)
    check_choice("form", form, FORMS)
    if x.dim() == 2:
        x, targets = x.unsqueeze(0), targets.unsqueeze(0)
        weight = None if weight is None else weight.unsqueeze(0)
        found = _solved(x, targets, weight, l2, num_classes, center, bool(bias), form, loo)
        if isinstance(found, Tensor):
            return found.squeeze(0)
        return found[0].squeeze(0), None if found[1] is None else found[1].squeeze(0)
    return _solved(x, targets, weight, l2, num_classes, center, bool(bias), form, loo)


def _solved(
    x: Tensor,
    targets: Tensor,
    weight: Tensor | None,
    l2: float | Tensor,
    num_classes: int | None,
    center: Tensor | None,
    bias: bool,
    form: str,
    loo: bool,
) -> tuple[Tensor, Tensor | None] | Tensor:
    with without_autocast(x.device):
        problem = _checked(x, targets, l2, num_classes, weight, center, bias)
        dual = form == "dual" if form != "auto" else x.shape[1] <= x.shape[2]
        if loo:
            return left_out(problem, fit(problem, dual, loo)).to(x.dtype)
        w, b = _fitted(problem, dual)
    return w.to(x.dtype), None if b is None else b.to(x.dtype)


def _fitted(problem: Problem, dual: bool) -> tuple[Tensor, Tensor | None]:
    if not _has_kernel(problem.x, dual):
        found = fit(problem, dual, loo=False)
        return found.weight, found.bias
    x, y, l2, weight, center, bias = problem
    if center is not None:
        y = y - x @ center.mT
    penalty = l2.reshape(-1).expand(len(x))
    head, intercept, *_ = ridge(x, y, weight.squeeze(2), penalty, RidgeOptions(bias, dual))
    return head if center is None else head + center, intercept if bias else None


def _has_kernel(x: Tensor, dual: bool) -> bool:
    """Whether native kernels fit x [T, S, D]: a system of some unknowns, and not of too many."""
    unknowns = x.shape[1] if dual else x.shape[2]
    return x[:1].numel() > 0 and unknowns <= _MOST_UNKNOWNS and is_native("ridge_head", x)


def _checked(
    x: Tensor,
    targets: Tensor,
    l2: float | Tensor,
    num_classes: int | None,
    weight: Tensor | None,
    center: Tensor | None,
    bias: bool,
) -> Problem:
    wide = accumulation_dtype(x.dtype)
    tasks, examples, _ = x.shape
    penalty = _penalty(l2, x)
    y, present = _checked_targets(targets, num_classes, x)
    weights = torch.ones(tasks, examples, dtype=wide, device=x.device)
    if weight is not None:
        check_floating("weight", weight)
        check_together("weight", weight, "x", x)
        check_shape("weight", weight, (tasks, examples))
        if is_readable(weight) and not bool((weight >= 0).all()):
            raise ValueError(f"weight: expected at least 0, got {float(weight.min())}")
        weights = weight.to(wide)
    x = x.to(wide)
    if present is not None:
        weights = weights * present
        x = x.masked_fill(~present.unsqueeze(2), 0)
    return Problem(x, y.to(wide), penalty, weights.unsqueeze(2), _prior(center, x, y), bias)


def _penalty(l2: float | Tensor, x: Tensor) -> Tensor:
    """``l2`` as ``[T, 1, 1]``, or ``[1, 1, 1]`` for all tasks."""
    wide = accumulation_dtype(x.dtype)
    if not isinstance(l2, Tensor):
        return torch.full((1, 1, 1), check_number("l2", l2), dtype=wide, device=x.device)
    check_floating("l2", l2)
    if list(l2.shape) not in ([], [x.shape[0]]):
        raise ValueError(f"l2: expected a number or [T] = [{x.shape[0]}], got {list(l2.shape)}")
    if l2.device != x.device and l2.dim():
        raise ValueError(f"l2: expected device {x.device} like x, got {l2.device}")
    if is_readable(l2) and not bool((l2 >= 0).all()):
        raise ValueError(f"l2: expected at least 0, got {float(l2.min())}")
    return l2.to(device=x.device, dtype=wide).reshape(-1, 1, 1)


def _checked_targets(
    targets: Tensor, num_classes: int | None, x: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Targets ``[T, S, N]``, and the present examples, bool ``[T, S]``; None: all of them."""
    if targets.is_floating_point():
        check_together("targets", targets, "x", x)
        if targets.dim() != 3 or targets.shape[:2] != x.shape[:2]:
            raise ValueError(
                f"targets: expected shape [T, S, N] with T, S = {list(x.shape[:2])}, "
                f"got {list(targets.shape)}"
            )
        return targets, None
    check_labels("targets", targets, x.shape[:2], x.device)
    if num_classes is None:
        num_classes = count_classes(targets, "targets", "")
    check_integer("num_classes", num_classes, 1)
    check_label_range(targets, num_classes, "targets")
    classes = torch.arange(num_classes, device=x.device)
    y = (targets.unsqueeze(2) == classes).to(accumulation_dtype(x.dtype))
    return y, targets != ABSENT if may_have_absent(targets) else None


def _prior(center: Tensor | None, x: Tensor, y: Tensor) -> Tensor | None:
    """The prior C of the weights as ``[T, N, D]``."""
    if center is None:
        return None
    check_floating("center", center)
    if center.device != x.device:
        raise ValueError(f"center: expected device {x.device} like x, got {center.device}")
    shape = [y.shape[2], x.shape[2]]
    if list(center.shape) not in (shape, [x.shape[0], *shape]):
        expected = f"{[x.shape[0], *shape]} or {shape}"
        raise ValueError(f"center: expected shape {expected}, got {list(center.shape)}")
    return center.to(x.dtype).expand(x.shape[0], *shape)
