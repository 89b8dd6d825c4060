"""Clipping of gradients before a rule takes its step."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta.rules.base import Hyperparameter, Rule, RuleWrapper, positive
from fastmeta.rules.sgd import SGD


class ClipValue(RuleWrapper):
    """Clip each element of the gradient to ``[-limit, limit]``.

    The derivative to clipped elements is zero.

    Args:
        limit: above 0; or an ``nn.Parameter`` ``[]`` or ``[P]``, which is then learned.
        rule: the rule that takes the step; None: plain ``SGD()``.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example:
        >>> import torch
        >>> import fastmeta as fm
        >>> rule = fm.rules.ClipValue(0.1, fm.rules.SGD(momentum=0.9))
        >>> maml = fm.MAML(torch.nn.Linear(3, 2), 0.1, 3, rule=rule)
        >>> x, y = torch.randn(4, 5, 3), torch.randint(0, 2, (4, 5))
        >>> maml.meta_loss(x, y, x, y)[0].backward()
    """

    def __init__(self, limit: Hyperparameter, rule: Rule | None = None) -> None:
        super().__init__(SGD() if rule is None else rule)
        self.limit = positive("limit", limit)

    def transform_gradient(self, grads: Tensor) -> Tensor:
        limit = torch.as_tensor(self.limit, dtype=grads.dtype, device=grads.device)
        return grads.clamp(-limit, limit)


class ClipNorm(RuleWrapper):
    """Scale the gradient of each task down to a Euclidean norm of ``limit`` if it is longer.

    The norm is over all parameters of the task, and is differentiated (Pascanu et al. 2013, arXiv
    1211.5063).

    Args:
        limit: above 0; or an ``nn.Parameter`` ``[]``, which is then learned.
        rule: the rule that takes the step; None: plain ``SGD()``.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example:
        >>> import torch
        >>> import fastmeta as fm
        >>> maml = fm.MAML(torch.nn.Linear(3, 2), 0.1, 3, rule=fm.rules.ClipNorm(10.0))
        >>> x, y = torch.randn(4, 5, 3), torch.randint(0, 2, (4, 5))
        >>> maml.meta_loss(x, y, x, y)[0].backward()
    """

    def __init__(self, limit: Hyperparameter, rule: Rule | None = None) -> None:
        super().__init__(SGD() if rule is None else rule)
        self.limit = positive("limit", limit)
        if isinstance(self.limit, Tensor) and self.limit.numel() != 1:
            raise ValueError(f"limit: expected one number, got shape {list(self.limit.shape)}")

    def transform_gradient(self, grads: Tensor) -> Tensor:
        # limit / max(norm, limit) instead of min(limit / norm, 1): finite at a norm of 0.
        norm = torch.linalg.vector_norm(grads, dim=1, keepdim=True)
        limit = torch.as_tensor(self.limit, dtype=grads.dtype, device=grads.device)
        return torch.where(norm > limit, grads * (limit / norm.clamp_min(limit)), grads)
