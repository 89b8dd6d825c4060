"""Steps that are held near their start."""

from __future__ import annotations

from torch import Tensor

from fastmeta.rules.base import Hyperparameter, Rule, RuleWrapper, State, hyperparameter
from fastmeta.rules.sgd import SGD


class Proximal(RuleWrapper):
    """Steps on ``L_s(theta) + strength / 2 |theta - theta_0|^2`` instead of the loss ``L_s``.

    The inner problem of iMAML (Rajeswaran et al. 2019, arXiv 1909.04630).

    Args:
        strength: at least 0, the paper's lambda; or an ``nn.Parameter`` ``[]`` or ``[P]``, which
            is then learned.
        rule: the rule that takes the step; None: plain ``SGD()``.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example:
        >>> import torch
        >>> import fastmeta as fm
        >>> maml = fm.MAML(torch.nn.Linear(3, 2), 0.1, 3, rule=fm.rules.Proximal(2.0))
        >>> x, y = torch.randn(4, 5, 3), torch.randint(0, 2, (4, 5))
        >>> maml.meta_loss(x, y, x, y)[0].backward()
    """

    def __init__(self, strength: Hyperparameter, rule: Rule | None = None) -> None:
        super().__init__(SGD() if rule is None else rule)
        self.strength = hyperparameter("strength", strength)

    @property
    def states(self) -> int:
        return 1 + self.rule.states

    def update(
        self, theta: Tensor, grads: Tensor, lr: Tensor, state: State, k: int
    ) -> tuple[Tensor, State]:
        # The state is theta_k - theta_0, since states start at zero; theta_0 does not.
        moved, *inner = state
        grads = grads + self.strength * moved
        after, later = self.rule.update(theta, grads, lr, tuple(inner), k)
        return after, (moved + (after - theta), *later)
