"""Gradient descent, with momentum."""

from __future__ import annotations

from torch import Tensor

from fastmeta.ops.inner_update import inner_update
from fastmeta.rules.base import (
    Hyperparameter,
    Pullback,
    Rule,
    State,
    Step,
    decayed,
    hyperparameter,
    is_zero,
)


class SGD(Rule):
    """Gradient descent with momentum and weight decay, as ``torch.optim.SGD``.

    With ``d_k = g_k + weight_decay theta_k`` and ``m_{k+1} = momentum m_k + d_k``, m_0 = 0:
    ``theta_{k+1} = theta_k - lr m_{k+1}``, or, with ``nesterov``,
    ``theta_k - lr (d_k + momentum m_{k+1})`` (Sutskever et al. 2013). Without any of them it is
    MAML's own step, which the task program runs inside one call.

    Args:
        momentum: 0 to below 1.
        nesterov: whether to look ahead along the momentum.
        weight_decay: at least 0.

    Each number may be an ``nn.Parameter`` ``[]`` or ``[P]`` instead, which is then learned.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example:
        >>> import torch
        >>> import fastmeta as fm
        >>> momentum = torch.nn.Parameter(torch.tensor(0.9))
        >>> maml = fm.MAML(torch.nn.Linear(3, 2), 0.1, 3, rule=fm.rules.SGD(momentum))
        >>> x, y = torch.randn(4, 5, 3), torch.randint(0, 2, (4, 5))
        >>> maml.meta_loss(x, y, x, y)[0].backward()
        >>> momentum.grad.shape
        torch.Size([])
    """

    def __init__(
        self,
        momentum: Hyperparameter = 0.0,
        nesterov: bool = False,
        weight_decay: Hyperparameter = 0.0,
    ) -> None:
        super().__init__()
        self.momentum = hyperparameter("momentum", momentum, below=1.0)
        self.weight_decay = hyperparameter("weight_decay", weight_decay)
        if not isinstance(nesterov, bool):
            raise TypeError(f"nesterov: expected a bool, got {nesterov!r}")
        if nesterov and is_zero(momentum):
            raise ValueError("nesterov: expected False without momentum, got True")
        self.nesterov = nesterov

    @property
    def states(self) -> int:
        return 0 if is_zero(self.momentum) else 1

    @property
    def is_plain(self) -> bool:
        return is_zero(self.momentum) and is_zero(self.weight_decay)

    def update(
        self, theta: Tensor, grads: Tensor, lr: Tensor, state: State, k: int
    ) -> tuple[Tensor, State]:
        grads = decayed(grads, theta, self.weight_decay)
        if not state:
            return inner_update(theta, grads, lr), ()
        velocity = self.momentum * state[0] + grads
        direction = grads + self.momentum * velocity if self.nesterov else velocity
        return inner_update(theta, direction, lr), (velocity,)

    def step(self, at: Step) -> tuple[Tensor, State]:
        if self.is_plain:  # inner_update takes care of the precision
            return inner_update(at.theta, at.grads, at.lr), ()
        return super().step(at)

    def vjp(self, at: Step, v: Tensor, state_v: State, requires: set[str]) -> Pullback:
        if not self.is_plain:
            return super().vjp(at, v, state_v, requires)
        # lr is float32 for v of half precision, and the gradient keeps the dtype of v.
        to_grads = (-at.lr * v).to(v.dtype) if "grads" in requires else None
        named = {}
        if "lr" in requires:
            named["lr"] = -(at.grads * v).sum_to_size(at.lr.shape)
        return Pullback(v, to_grads, (), named)


PLAIN = SGD()
