"""Ridge regression in plain PyTorch: any derivative, and the leave-one-out outputs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastmeta.core.absence import is_readable


class Problem(NamedTuple):
    """Checked arguments, batched, in the dtype of the computation."""

    x: Tensor  # [T, S, D]; 0 at absent examples
    y: Tensor  # [T, S, N]; 0 at absent examples
    l2: Tensor  # [T, 1, 1]
    weight: Tensor  # [T, S, 1]; 0 at absent examples
    center: Tensor | None  # [T, N, D]
    bias: bool


class Fit(NamedTuple):
    """A fitted head, and what its leave-one-out outputs need."""

    weight: Tensor  # [T, N, D]
    bias: Tensor | None  # [T, N]
    residual: Tensor  # [T, S, N], by a factor that leverage has too
    freedom: Tensor  # [T, S, 1], 1 - h_s by this factor, h the diagonal of the hat matrix


def fit(problem: Problem, dual: bool, loo: bool) -> Fit:
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
    return Fit(w, b, residual, freedom)


def _dual(
    x: Tensor, y: Tensor, problem: Problem, share: Tensor | None, loo: bool
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
    x: Tensor, y: Tensor, problem: Problem, share: Tensor | None, loo: bool
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


def left_out(problem: Problem, fit: Fit) -> Tensor:
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
