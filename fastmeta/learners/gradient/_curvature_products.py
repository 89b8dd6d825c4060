"""Products with the curvature of each task's loss."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor, nn

from fastmeta.core.trees import Tree
from fastmeta.engines.base import Engine
from fastmeta.learners._batches import examples_of


class CurvatureProducts:
    """Base of learners that multiply with the Hessian or Gauss-Newton matrix of their loss."""

    module: nn.Module

    @property
    @abstractmethod
    def _engine(self) -> Engine:
        """The engine that takes the products."""

    def hvp(self, params: Tensor, batch: Tree, vector: Tensor) -> Tensor:
        """The Hessian of each task's loss times one vector or many (Pearlmutter 1994).

        ``H v = d <grad L(params), v> / d params`` with the learner's loss and ``hvp_mode``. The
        Hessian is never formed.

        Args:
            params: parameters at which the Hessian is taken, in the order of the module's trainable
                parameters: ``[P]`` for all tasks, or ``[T, P]`` as in ``AdaptedTasks.params``.
            batch: ``(x, y)`` with x ``[T, B, ...]`` and y ``[T, B]`` int64 labels or floating-point
                targets ``[T, B, ...]``; or a dict or a dataclass, as for ``MAML.meta_loss``.
            vector: ``[P]`` for all tasks, or ``[T, P]``; or many vectors ``[K, T, P]``, whose
                products share the passes that do not depend on the vector.

        Returns:
            ``[T, P]``, or ``[K, T, P]``; differentiable like the result of ``fastmeta.hvp``.

        Raises:
            TypeError, ValueError: naming the argument that does not fit; no tasks or no examples.
            RuntimeError: inference mode, which has no gradients.

        Example:
            >>> import torch
            >>> from fastmeta import MAML
            >>> maml = MAML(torch.nn.Linear(1, 1, bias=False), loss=torch.nn.functional.mse_loss)
            >>> x, y = torch.full((2, 5, 1), 3.0), torch.zeros(2, 5, 1)
            >>> maml.hvp(torch.zeros(1), (x, y), torch.ones(1))  # d^2/dw^2 mean (3 w)^2 = 18
            tensor([[18.],
                    [18.]])
        """
        return self._engine.hvp(params, examples_of(self.module, batch), vector)

    def ggnvp(self, params: Tensor, batch: Tree, vector: Tensor) -> Tensor:
        """The Gauss-Newton matrix of each task's loss times one vector or many.

        ``J' H_L J v``, with J the derivative of the outputs in the parameters and H_L the Hessian
        of the loss in the outputs: positive semidefinite where the loss is convex in the outputs,
        and cheaper than the Hessian, see ``fastmeta.ggnvp``. Arguments, result and errors are as
        for ``hvp``; ``hvp_mode`` says how J v is taken.
        """
        return self._engine.ggnvp(params, examples_of(self.module, batch), vector)
