"""Meta-SGD as in ``learn2learn.algorithms.meta_sgd``: one task at a time, by clone and adapt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from fastmeta.compat.learn2learn.algorithms.base_learner import BaseLearner
from fastmeta.compat.learn2learn.utils import check_length, clone_module, clone_parameters
from fastmeta.learners.gradient._adapt_step import descend, task_gradients
from fastmeta.learners.gradient._module_copy import Module


def meta_sgd_update(
    model: Module, lrs: Sequence[Tensor], grads: Sequence[Tensor | None] | None = None
) -> Module:
    """Replace the model's parameters p by ``p - lr * grad``, differentiably.

    Args:
        model: a clone; its parameters are replaced, the old tensors are not changed.
        lrs: step sizes, one tensor a parameter in the order of ``model.parameters()``.
        grads: gradients, one a parameter; None in the list skips the parameter. Without this
            argument: the ``.grad`` of the parameters.

    Returns:
        The model.

    Raises:
        ValueError: another number of step sizes or gradients than of parameters.

    Example:
        >>> import torch
        >>> import fastmeta.compat.learn2learn as l2l
        >>> net = torch.nn.Linear(2, 1)
        >>> clone = l2l.clone_module(net)
        >>> lrs = [torch.ones_like(p) for p in net.parameters()]
        >>> grads = torch.autograd.grad(clone(torch.ones(1, 2)).sum(), clone.parameters())
        >>> torch.equal(l2l.algorithms.meta_sgd_update(clone, lrs, grads).bias, net.bias - 1)
        True
    """
    params = list(model.parameters())
    grads = [p.grad for p in params] if grads is None else grads
    check_length("lrs", lrs, params)
    check_length("grads", grads, params)
    descend(model, zip(params, grads, strict=True), lrs)
    return model


class MetaSGD(BaseLearner):
    """learn2learn's Meta-SGD (Li et al. 2017, arXiv 1707.09835): MAML with learned step sizes.

    Every element of every parameter has its own step size, learned with the parameters.

    Args:
        model: any module, all of whose parameters are adapted.
        lr: initial value of the step sizes.
        first_order: leave the Hessian out. Step sizes still get a gradient.
        lrs: step sizes, one tensor a parameter, instead of ``lr``.

    Attributes:
        lrs: the step sizes, an ``nn.ParameterList`` unless they were given.

    Example:
        >>> import torch
        >>> import fastmeta.compat.learn2learn as l2l
        >>> X, y, loss = torch.randn(5, 20), torch.randn(5, 10), torch.nn.MSELoss()
        >>> linear = l2l.algorithms.MetaSGD(torch.nn.Linear(20, 10), lr=0.01)
        >>> clone = linear.clone()
        >>> error = loss(clone(X), y)
        >>> clone.adapt(error)
        >>> error = loss(clone(X), y)
        >>> error.backward()
        >>> linear.lrs[0].grad.shape
        torch.Size([10, 20])
    """

    lrs: Iterable[Tensor]

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1.0,
        first_order: bool = False,
        lrs: Iterable[Tensor] | None = None,
    ) -> None:
        super().__init__(model)
        if lrs is None:
            lrs = nn.ParameterList(torch.full_like(p, lr) for p in model.parameters())
        self.lrs = lrs
        self.first_order = first_order

    def clone(self) -> MetaSGD:
        """A learner for one task; autograd connects its parameters and step sizes to this one's."""
        lrs = clone_parameters(self.lrs)
        return MetaSGD(clone_module(self.module), first_order=self.first_order, lrs=lrs)

    def adapt(self, loss: Tensor, first_order: bool | None = None) -> None:
        """Take one gradient step of a clone on the loss of its task, by the learned step sizes.

        Args:
            loss: scalar, computed with this learner.
            first_order: None for the learner's own.

        Raises:
            ValueError: frozen or unused parameters; a loss that was computed without gradients.
        """
        first_order = self.first_order if first_order is None else first_order
        grads = task_gradients(self.module, loss, first_order, allow_unused=None, allow_nograd=None)
        descend(self.module, grads.items(), self.lrs)
