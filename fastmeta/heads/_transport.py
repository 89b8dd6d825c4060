"""Optimal transport of queries to classes: assignments with given sums, by Newton's method."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta.core.absence import is_readable

_MOST_ROUNDS = 100
_ROUNDS = 20  # where convergence cannot be read


def transported(
    scores: Tensor, sizes: Tensor, potentials: Tensor, share: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Plan P = softmax_n(scores + f) whose sums over the queries are ``sizes``.

    This is the optimal plan of entropic transport with the costs -scores: each query has mass 1,
    class n gets mass ``sizes[n]``. Sinkhorn's iterations end there too. The potentials f minimise

        F(f) = sum_q logsumexp_n(scores + f) - sum_n sizes_n f_n,

    which is convex in N unknowns; so Newton's method needs few rounds also where Sinkhorn's
    iterations need thousands. Its step is shortened by log(1 + r) / r, with r the range of the
    step, which makes F fall from any start.

    Args:
        scores: ``[T, N, Q]``, minus infinity at classes that do not compete.
        sizes: ``[T, N, 1]``; 0 at these classes; their sum is the number of queries.
        potentials: f to begin with, ``[T, N, 1]``.
        share: mass of each query ``[T, 1, Q]``, 1 or 0. None: all have 1.

    Returns:
        The potentials and the logarithm of the plan ``[T, N, Q]``. The derivatives in ``scores``,
        of first and second order, are exact for the optimal plan.
    """
    with torch.no_grad():
        potentials = _solved(scores.detach(), sizes, potentials.detach(), share)
    if scores.requires_grad and torch.is_grad_enabled():
        # A step from the solution has its first derivative, and a second step the second one.
        for _ in range(2):
            plan = _plan(scores, potentials, share)
            missing = sizes - plan.sum(2, keepdim=True)
            potentials = potentials + _step(plan, missing, sizes)
    return potentials, torch.log_softmax(scores + potentials, 1)


def _solved(scores: Tensor, sizes: Tensor, potentials: Tensor, share: Tensor | None) -> Tensor:
    readable = is_readable(scores)
    # One more step leaves an error of the size of the square.
    near = torch.finfo(scores.dtype).eps ** 0.5
    for _ in range(_MOST_ROUNDS if readable else _ROUNDS):
        plan = _plan(scores, potentials, share)
        missing = sizes - plan.sum(2, keepdim=True)
        step = _step(plan, missing, sizes)
        reach = step.amax(1, keepdim=True) - step.amin(1, keepdim=True)
        potentials = potentials + step * (reach.log1p() / reach).where(reach > 0, 1.0)
        if readable and bool((missing.abs() <= near * sizes).all()):
            break
    return potentials


def _plan(scores: Tensor, potentials: Tensor, share: Tensor | None) -> Tensor:
    plan = torch.softmax(scores + potentials, 1)
    return plan if share is None else plan * share


def _step(plan: Tensor, missing: Tensor, sizes: Tensor) -> Tensor:
    """Newton's step ``[T, N, 1]``: H step = missing, with H = diag(sums) - P P'."""
    hessian = torch.diag_embed(plan.sum(2)) - plan @ plan.mT
    # Adding one number to all potentials changes nothing: the null space of H gets a value.
    competes = (sizes > 0).to(plan.dtype)
    least = torch.finfo(plan.dtype).eps * (1 + sizes.amax(1, keepdim=True))
    regular = competes @ competes.mT + least * torch.eye(
        plan.shape[1], dtype=plan.dtype, device=plan.device
    )
    return torch.linalg.solve(hessian + regular, missing)
