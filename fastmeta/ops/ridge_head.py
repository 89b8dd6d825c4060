"""Ridge regression of every task in closed form, and its leave-one-out outputs."""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

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
from fastmeta.ops.reference import check_label_range

FORMS = ("auto", "primal", "dual")


class _Problem(NamedTuple):
    """Checked arguments, batched, in the dtype of the computation."""

    x: Tensor  # [T, S, D]; 0 at absent examples
    y: Tensor  # [T, S, N]; 0 at absent examples
    l2: Tensor  # [T, 1, 1]
    weight: Tensor  # [T, S, 1]; 0 at absent examples
    center: Tensor | None  # [T, N, D]
    bias: bool


class _Fit(NamedTuple):
    """A fitted head, and what its leave-one-out outputs need."""

    weight: Tensor  # [T, N, D]
    bias: Tensor | None  # [T, N]
    residual: Tensor  # [T, S, N], by a factor that leverage has too
    freedom: Tensor  # [T, S, 1], 1 - h_s by this factor, h the diagonal of the hat matrix


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
    weight and center. Plain PyTorch: one batched solve, whose factors serve the gradient too.
    bfloat16 and float16 are computed in float32. Apply the head to queries with
    ``fm.task_linear(query, W, b)``.

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
            ``l2`` of 0.

    Source: Bertinetto et al. 2019 (arXiv 1805.08136), equation 4, for the dual form; Allen 1974
    (Technometrics 16), for the leave-one-out outputs.

    Example:
        >>> import torch
        >>> import fastmeta as fm
        >>> x, y = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[1.0], [3.0], [5.0]])
        >>> fm.ridge_head(x, y, l2=0.0)
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
        fit = _fit(problem, dual, loo)
        if loo:
            return _left_out(problem, fit).to(x.dtype)
    return fit.weight.to(x.dtype), None if fit.bias is None else fit.bias.to(x.dtype)


def _fit(problem: _Problem, dual: bool, loo: bool) -> _Fit:
    """The head; with ``loo`` also the diagonal of the hat matrix."""
    x, y, _l2, weight, center, bias = problem
    if bias:
        share = weight / _or_one(weight.sum(1, keepdim=True))
        mean_x, mean_y = share.mT @ x, share.mT @ y
        # Absent examples stay 0: they would add nothing but rounding.
        x, y = x - mean_x, y - mean_y
    else:
        share = None
    if center is not None:
        y = y - x @ center.mT
    solve = _dual if dual else _primal
    own, residual, freedom = solve(x, y, problem, share, loo)
    w = own if center is None else own + center
    b = (mean_y - mean_x @ w.mT).squeeze(1) if bias else None
    return _Fit(w, b, residual, freedom)


def _dual(
    x: Tensor, y: Tensor, problem: _Problem, share: Tensor | None, loo: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Solve ``(X X' diag(w) + l2) u = y``; then ``W = (w u)' X``, and l2 u are the residuals.

    This form, which is not symmetric, has derivatives at weight 0 too.
    """
    l2, weight = problem.l2, problem.weight
    system = (x @ x.mT) * weight.mT + l2 * _eye(x.shape[1], x)
    extra = None
    if share is not None:
        # Rows of centred x are dependent. Adding to the system in their null space makes it
        # regular where l2 is 0, and changes nothing, as y has no part there.
        extra = _or_one(system.detach().diagonal(dim1=1, dim2=2).mean(1)).view(-1, 1, 1)
        system = system + extra * share.mT
    # An absent example of l2 = 0 has a row of zeros. Its u may be anything, and has factor 0.
    system = system + torch.diag_embed(((weight == 0) & (l2 == 0)).to(x.dtype).squeeze(2))
    right = torch.cat([y, _eye(x.shape[1], x).expand_as(system)], 2) if loo else y
    solution = _solve(system, right, l2)
    u = solution[..., : y.shape[2]]
    if not loo:
        return (weight * u).mT @ x, u, u
    freedom = solution[..., y.shape[2] :].diagonal(dim1=1, dim2=2).unsqueeze(2)
    if share is not None and extra is not None:
        freedom = freedom - share / (l2 + extra)
    return (weight * u).mT @ x, u, freedom


def _primal(
    x: Tensor, y: Tensor, problem: _Problem, share: Tensor | None, loo: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Solve ``(X' diag(w) X + l2) W' = X' diag(w) y``."""
    l2, weight = problem.l2, problem.weight
    weighted = weight * x
    system = x.mT @ weighted + l2 * _eye(x.shape[2], x)
    right = torch.cat([weighted.mT @ y, x.mT], 2) if loo else weighted.mT @ y
    solution = _solve(system, right, l2)
    w = solution[..., : y.shape[2]].mT
    if not loo:
        return w, y, y
    hat = weight * (x * solution[..., y.shape[2] :].mT).sum(2, keepdim=True)
    return w, y - x @ w.mT, 1 - hat if share is None else 1 - hat - share


def _left_out(problem: _Problem, fit: _Fit) -> Tensor:
    """Leave-one-out outputs ``[T, S, N]``."""
    x, weight = problem.x, problem.weight
    # Without any other example the head is C, and has no bias.
    last = weight.sum(1, keepdim=True) - weight <= 0
    out = problem.y - fit.residual / fit.freedom.masked_fill(last, 1)
    prior = torch.zeros_like(out) if problem.center is None else x @ problem.center.mT
    return torch.where(last, prior, out)


def _solve(system: Tensor, right: Tensor, l2: Tensor) -> Tensor:
    """``system^-1 right``; ValueError if the system of a task is singular."""
    if system.shape[-1] == 0:
        return right
    solution, info = torch.linalg.solve_ex(system, right)
    if is_readable(info):
        singular = info != 0
        if is_readable(l2) and bool((l2 == 0).any()):
            singular = singular | _nearly_singular(system.detach())
        if bool(singular.any()):
            task = int(singular.int().argmax())
            given = float(l2.expand(len(system), 1, 1)[task])
            raise ValueError(
                f"l2: expected a larger number, as the examples of task {task} are equal or "
                f"dependent and its system is singular, got {given:g}"
            )
    return solution


def _nearly_singular(system: Tensor) -> Tensor:
    """Whether the last digit decides about the solution, bool ``[T]``."""
    values = torch.linalg.svdvals(system)
    smallest = system.shape[-1] * torch.finfo(system.dtype).eps * values[:, 0]
    return values[:, -1] <= smallest


def _eye(size: int, like: Tensor) -> Tensor:
    return torch.eye(size, dtype=like.dtype, device=like.device)


def _or_one(x: Tensor) -> Tensor:
    """``x``, and 1 where it is 0, to divide by."""
    return x.where(x != 0, torch.ones_like(x))


def _checked(
    x: Tensor,
    targets: Tensor,
    l2: float | Tensor,
    num_classes: int | None,
    weight: Tensor | None,
    center: Tensor | None,
    bias: bool,
) -> _Problem:
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
    return _Problem(x, y.to(wide), penalty, weights.unsqueeze(2), _prior(center, x, y), bias)


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
