"""higher's differentiable inner loops, under higher's names.

    import fastmeta.compat.higher as higher   # was: import higher

innerloop_ctx    a functional copy of a network, and a differentiable optimizer
monkeypatch, get_diff_optim    its two halves
optim            DifferentiableSGD, DifferentiableAdam, DifferentiableRMSprop, learned settings

The documentation lists the differences from higher 0.2.1, see "Port a script".
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
        opt: an SGD, Adam or RMSprop of ``torch.optim`` over all or some of the model's parameters.
            The inner loop starts from its settings and its state.
        device: device of the copy and of the optimizer's state; None: unchanged.
        copy_initial_weights: start from copies that are detached from the model's parameters. MAML
            needs False: gradients then reach the model.
        override: settings of the optimizer by name, each a list of one value for all parameter
            groups or of one value a group. Tensors that require gradients get them.
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
