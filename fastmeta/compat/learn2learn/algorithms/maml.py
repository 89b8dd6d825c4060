"""MAML as in ``learn2learn.algorithms.maml``: one task at a time, by clone and adapt."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fastmeta.compat.learn2learn.algorithms.base_learner import BaseLearner
from fastmeta.compat.learn2learn.utils import check_length, clone_module, update_module
from fastmeta.learners.gradient._adapt_step import descend, task_gradients
from fastmeta.learners.gradient._module_copy import Module


def maml_update(
    model: Module, lr: float | Tensor, grads: Sequence[Tensor | None] | None = None
) -> Module:
    """Replace the model's parameters p by ``p - lr * grad``, differentiably.

    Args:
        model: a clone; its parameters are replaced, the old tensors are not changed.
        lr: a number, or a tensor that broadcasts to every parameter.
        grads: one a parameter, in the order of ``model.parameters()``; None skips the parameter.
            Without this argument the ``.update`` attributes are added, as by ``update_module``.

    Returns:
        The model.

    Raises:
        ValueError: another number of gradients than of parameters.

    Example:
        >>> import torch
        >>> import fastmeta.compat.learn2learn as l2l
        >>> net = torch.nn.Linear(2, 1)
        >>> clone = l2l.clone_module(net)
        >>> grads = torch.autograd.grad(clone(torch.ones(1, 2)).sum(), clone.parameters())
        >>> torch.equal(l2l.algorithms.maml_update(clone, 1.0, grads).bias, net.bias - 1)
        True
    """
    if grads is None:
        return update_module(model)
    params = list(model.parameters())
    check_length("grads", grads, params)
    descend(model, zip(params, grads, strict=True), [lr] * len(params))
    return model


class MAML(BaseLearner):
    """learn2learn's MAML (Finn et al. 2017, arXiv 1703.03400).

    ``clone`` makes a task's learner and ``adapt`` takes its gradient steps, unrolled by autograd.
    ``fastmeta.MAML.meta_loss`` computes the same meta-gradient for all tasks at once, and faster.

    Args:
        model: any module.
        lr: inner step size: a number, or a tensor that broadcasts to every parameter. An
            ``nn.Parameter`` is learned with the model.
        first_order: leave the Hessian out (FOMAML).
        allow_unused: ``adapt`` skips parameters on which the loss does not depend, instead of
            raising. None: as ``allow_nograd``.
        allow_nograd: ``adapt`` skips frozen parameters, instead of raising.

    Example:
        >>> import torch
        >>> import fastmeta.compat.learn2learn as l2l
        >>> X, y, loss = torch.randn(5, 20), torch.randn(5, 10), torch.nn.MSELoss()
        >>> linear = l2l.algorithms.MAML(torch.nn.Linear(20, 10), lr=0.01)
        >>> clone = linear.clone()
        >>> error = loss(clone(X), y)
        >>> clone.adapt(error)
        >>> error = loss(clone(X), y)
        >>> error.backward()
        >>> linear.module.weight.grad.shape
        torch.Size([10, 20])
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor,
        first_order: bool = False,
        allow_unused: bool | None = None,
        allow_nograd: bool = False,
    ) -> None:
        super().__init__(model)
        self.lr = lr
        self.first_order = first_order
        self.allow_nograd = allow_nograd
        self.allow_unused = allow_nograd if allow_unused is None else allow_unused

    def adapt(
        self,
        loss: Tensor,
        first_order: bool | None = None,
        allow_unused: bool | None = None,
        allow_nograd: bool | None = None,
    ) -> None:
        """Take one gradient step of a clone on the loss of its task.

        Args:
            loss: scalar, computed with this learner.
            first_order, allow_unused, allow_nograd: None for the learner's own.

        Raises:
            ValueError: frozen or unused parameters without the option that allows them; a loss
                that was computed without gradients.
        """
        grads = task_gradients(
            self.module,
            loss,
            self.first_order if first_order is None else first_order,
            self.allow_unused if allow_unused is None else allow_unused,
            self.allow_nograd if allow_nograd is None else allow_nograd,
        )
        descend(self.module, grads.items(), [self.lr] * len(grads))

    def clone(
        self,
        first_order: bool | None = None,
        allow_unused: bool | None = None,
        allow_nograd: bool | None = None,
    ) -> MAML:
        """A learner for one task, whose parameters autograd connects to this learner's.

        Args:
            first_order, allow_unused, allow_nograd: None for this learner's own.
        """
        return MAML(
            clone_module(self.module),
            self.lr,
            self.first_order if first_order is None else first_order,
            self.allow_unused if allow_unused is None else allow_unused,
            self.allow_nograd if allow_nograd is None else allow_nograd,
        )
