"""higher's differentiable inner loops, under higher's names.

    import fastmeta.compat.higher as higher   # was: import higher

innerloop_ctx    a functional copy of a network, and an optimizer that autograd follows
monkeypatch, get_diff_optim    its two halves
optim            DifferentiableSGD, DifferentiableAdam, DifferentiableRMSprop, learned settings

What differs from higher 0.2.1 is listed in the documentation, "Port a script".
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fastmeta.compat._missing import missing
from fastmeta.compat.higher import optim, patch
from fastmeta.compat.higher.optim import DifferentiableOptimizer, Override, get_diff_optim
from fastmeta.compat.higher.patch import monkeypatch

__all__ = [
    "get_diff_optim",
    "innerloop_ctx",
    "monkeypatch",
    "optim",
    "patch",
]


@contextmanager
def innerloop_ctx(
    model: nn.Module,
    opt: torch.optim.Optimizer,
    device: torch.device | str | None = None,
    copy_initial_weights: bool = True,
    override: Override | None = None,
    track_higher_grads: bool = True,
) -> Iterator[tuple[Any, DifferentiableOptimizer]]:
    """A functional copy of a network and a differentiable optimizer for it.

    Args:
        model: any module; it is not changed.
        opt: an SGD, Adam or RMSprop of ``torch.optim`` over the model's parameters, or some of
            them. Its settings and its state are where the inner loop starts.
        device: where the copy and the optimizer's state go; None: where they are.
        copy_initial_weights: start from copies that have no connection to the model's parameters.
            MAML needs False: gradients then reach the model.
        override: settings of the optimizer by name, each a list of one value for all parameter
            groups or of one a group. Tensors that require gradients get them.
        track_higher_grads: keep the graph of the inner loop. False for evaluation: every step
            starts from new leaves.

    Yields:
        The copy, a ``patch.Functional`` module of the model's own class: call it, or read its
        ``parameters(time=k)`` after k steps; and an ``optim.DifferentiableOptimizer``, whose
        ``step(loss)`` updates it.

    Raises:
        ValueError: an optimizer or a setting that is not supported.

    Example:
        >>> import torch
        >>> import fastmeta.compat.higher as higher
        >>> net, x = torch.nn.Linear(3, 1), torch.randn(5, 3)
        >>> inner = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> with higher.innerloop_ctx(net, inner, copy_initial_weights=False) as (fnet, diffopt):
        ...     params = diffopt.step(fnet(x).square().mean())
        ...     fnet(x).square().mean().backward()
        >>> net.weight.grad.shape
        torch.Size([1, 3])
    """
    fmodel = monkeypatch(model, device, copy_initial_weights, track_higher_grads)
    params = model.parameters()
    yield fmodel, get_diff_optim(opt, params, fmodel, device, override, track_higher_grads)


_INSTEAD = {
    "create_diff_optim": "give get_diff_optim an optimizer of torch.optim",
    "register_optim": "subclass fastmeta.compat.higher.optim.DifferentiableOptimizer and make "
    "the optimizer yourself, or write a fastmeta.rules.Rule for fastmeta.MAML",
}


def __getattr__(name: str) -> object:
    raise missing(__name__, name, _INSTEAD)
