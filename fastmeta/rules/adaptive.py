"""Rules that scale steps by a second moment of past gradients: Adam, PersistentAdam, RMSProp.

Symbols: g_k is the gradient at theta_k, m and s its first and second moment.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastmeta.core.dtypes import accumulation_dtype
from fastmeta.core.parameter_layout import ParameterLayout
from fastmeta.core.parameter_selection import Selector, selected_names
from fastmeta.rules.base import (
    Hyperparameter,
    Rule,
    State,
    check_made_for,
    decayed,
    hyperparameter,
    positive,
)


def _average(old: Tensor, new: Tensor, decay: Hyperparameter) -> Tensor:
    """Moving average: ``decay old + (1 - decay) new``."""
    return decay * old + (1 - decay) * new


def _scaled_step(
    theta: Tensor, lr: Tensor, direction: Tensor, second: Tensor, eps: Hyperparameter
) -> Tensor:
    """theta after a step along ``direction / sqrt(second + eps)``.

    ``eps`` stands INSIDE the square root: the derivative of ``sqrt(s)`` at s = 0 is infinite.
    """
    return theta - lr * direction / (second + eps).sqrt()


class Adam(Rule):
    """Adam (Kingma & Ba 2015, arXiv 1412.6980), differentiable also where gradients are zero.

    ``m_{k+1} = beta1 m_k + (1 - beta1) g_k``, ``s_{k+1} = beta2 s_k + (1 - beta2) g_k^2``, and
    ``theta_{k+1} = theta_k - lr m' / sqrt(s' + eps)`` with ``m' = m_{k+1} / (1 - beta1^(k+1))``
    and ``s' = s_{k+1} / (1 - beta2^(k+1))``.

    ``eps`` stands INSIDE the square root; ``torch.optim.Adam`` adds it outside. At a second moment
    of zero the derivative of ``sqrt(s)`` is infinite, and the derivative of ``sqrt(s + eps)`` is
    finite. A gradient counts as small below ``sqrt(eps)``, 1e-4 by default.

    Args:
        betas: beta1 and beta2, each 0 to below 1; Reptile takes (0, 0.999).
        eps: above 0.
        weight_decay: at least 0; the gradient becomes ``g_k + weight_decay theta_k``.

    Each number may be an ``nn.Parameter`` ``[]`` or ``[P]`` instead, which is then learned.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example:
        >>> import torch
        >>> import fastmeta as fm
        >>> maml = fm.MAML(torch.nn.Linear(3, 2), 0.01, 3, rule=fm.rules.Adam())
        >>> x, y = torch.randn(4, 5, 3), torch.randint(0, 2, (4, 5))
        >>> maml.meta_loss(x, y, x, y)[0].backward()
    """

    def __init__(
        self,
        betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
        eps: Hyperparameter = 1e-8,
        weight_decay: Hyperparameter = 0.0,
    ) -> None:
        super().__init__()
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise TypeError(f"betas: expected a pair of numbers, got {betas!r}")
        self.beta1 = hyperparameter("betas[0]", betas[0], below=1.0)
        self.beta2 = hyperparameter("betas[1]", betas[1], below=1.0)
        self.eps = positive("eps", eps)
        self.weight_decay = hyperparameter("weight_decay", weight_decay)

    @property
    def states(self) -> int:
        return 2

    def update(
        self, theta: Tensor, grads: Tensor, lr: Tensor, state: State, k: int
    ) -> tuple[Tensor, State]:
        grads = decayed(grads, theta, self.weight_decay)
        first = _average(state[0], grads, self.beta1)
        second = _average(state[1], grads.square(), self.beta2)
        # Averages that start at zero are too small by these factors.
        unbiased_first = first / (1 - self.beta1 ** (k + 1))
        unbiased_second = second / (1 - self.beta2 ** (k + 1))
        after = _scaled_step(theta, lr, unbiased_first, unbiased_second, self.eps)
        return after, (first, second)


class PersistentAdam(Rule):
    """Adam with beta1 = 0 whose second moment persists from one meta-batch to the next.

    The steps are ``Adam``'s, but a task does not start with a second moment of zero. It starts with
    the mean over tasks of the last meta-batch's final moments, and the bias correction counts the
    steps of all meta-batches. The first step of a new ``Adam`` has length ``lr``, however small the
    gradient; here it shrinks with the gradients. The code published with Reptile (Nichol et al.
    2018) does the same: one optimizer runs through all tasks.

    The moment is updated by ``Reptile.meta_loss`` and ``meta_gradient``. In other inner loops, as
    in ``adapt_tasks``, it is read only. Nothing is differentiated through it.

    Args:
        module: the model with the parameters to adapt.
        beta2: 0 to below 1.
        eps: above 0, inside the square root.
        adapt: the parameters to adapt, as for ``fastmeta.MAML``; None: all trainable ones.

    Attributes:
        second: the persistent moment ``[P]``, a buffer; zeros at first.
        taken: the number of steps in it, a buffer.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example:
        >>> import torch
        >>> import fastmeta as fm
        >>> net = torch.nn.Linear(3, 2)
        >>> learner = fm.Reptile(net, steps=3, rule=fm.rules.PersistentAdam(net))
        >>> x, y = torch.randn(4, 5, 3), torch.randint(0, 2, (4, 5))
        >>> loss, logits = learner.meta_loss(x, y, x, y)
        >>> learner.rule.taken.item(), bool((learner.rule.second > 0).all())
        (3, True)
    """

    second: Tensor
    taken: Tensor

    def __init__(
        self,
        module: nn.Module,
        beta2: float = 0.999,
        eps: float = 1e-8,
        adapt: Selector | Sequence[Selector] | None = None,
    ) -> None:
        super().__init__()
        self._layout = layout = ParameterLayout.of(module, selected_names(module, adapt))
        self.beta2 = hyperparameter("beta2", beta2, below=1.0)
        self.eps = positive("eps", eps)
        size = layout.numel
        dtype = accumulation_dtype(layout.dtype)
        self.register_buffer("second", torch.zeros(size, dtype=dtype, device=layout.device))
        self.register_buffer("taken", torch.zeros((), dtype=torch.int64, device=layout.device))
        self._ends: list[tuple[int, Tensor]] | None = None

    @property
    def states(self) -> int:
        return 1

    def check(self, layout: ParameterLayout) -> None:
        check_made_for(self._layout, layout, "PersistentAdam")

    def start(self, theta: Tensor) -> State:
        return (self.second.expand_as(theta),)

    def update(
        self, theta: Tensor, grads: Tensor, lr: Tensor, state: State, k: int
    ) -> tuple[Tensor, State]:
        second = _average(state[0], grads.square(), self.beta2)
        # In float64, as float32 rounds 1 - beta2^n for small n.
        unbiased = second / (1 - self.beta2 ** (self.taken + (k + 1)).double())
        return _scaled_step(theta, lr, grads, unbiased, self.eps), (second,)

    def finish(self, state: State, steps: int) -> None:
        if self._ends is not None:
            self._ends.append((steps, state[0]))

    @contextmanager
    def persist_state(self) -> Iterator[None]:
        ends: list[tuple[int, Tensor]] = []
        self._ends = ends
        try:
            yield
        finally:
            self._ends = None
        if ends:
            self.second.copy_(torch.cat([second for _, second in ends]).mean(0))
            self.taken += max(steps for steps, _ in ends)


class RMSProp(Rule):
    """RMSProp (Tieleman & Hinton 2012), differentiable also where gradients are zero.

    ``s_{k+1} = alpha s_k + (1 - alpha) g_k^2``, s_0 = 0, and
    ``theta_{k+1} = theta_k - lr g_k / sqrt(s_{k+1} + eps)``. ``eps`` stands INSIDE the square root,
    for the same reason as in ``Adam``; ``torch.optim.RMSprop`` adds it outside.

    Args:
        alpha: 0 to below 1.
        eps: above 0.
        weight_decay: at least 0; the gradient becomes ``g_k + weight_decay theta_k``.

    Each number may be an ``nn.Parameter`` ``[]`` or ``[P]`` instead, which is then learned.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example:
        >>> import torch
        >>> import fastmeta as fm
        >>> maml = fm.MAML(torch.nn.Linear(3, 2), 0.01, 3, rule=fm.rules.RMSProp())
        >>> x, y = torch.randn(4, 5, 3), torch.randint(0, 2, (4, 5))
        >>> maml.meta_loss(x, y, x, y)[0].backward()
    """

    def __init__(
        self,
        alpha: Hyperparameter = 0.99,
        eps: Hyperparameter = 1e-8,
        weight_decay: Hyperparameter = 0.0,
    ) -> None:
        super().__init__()
        self.alpha = hyperparameter("alpha", alpha, below=1.0)
        self.eps = positive("eps", eps)
        self.weight_decay = hyperparameter("weight_decay", weight_decay)

    @property
    def states(self) -> int:
        return 1

    def update(
        self, theta: Tensor, grads: Tensor, lr: Tensor, state: State, k: int
    ) -> tuple[Tensor, State]:
        grads = decayed(grads, theta, self.weight_decay)
        second = _average(state[0], grads.square(), self.alpha)
        return _scaled_step(theta, lr, grads, second, self.eps), (second,)
