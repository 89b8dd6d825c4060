"""Rules that divide by the size that gradients have had: Adam, also carried, and RMSProp."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastmeta.core.dtypes import accumulation_dtype
from fastmeta.core.parameter_layout import ParameterLayout
from fastmeta.rules.base import (
    Hyperparameter,
    Rule,
    State,
    check_made_for,
    decayed,
    hyperparameter,
    positive,
)


class Adam(Rule):
    """Adam (Kingma & Ba 2015, arXiv 1412.6980), differentiable also where gradients are zero.

    ``m_{k+1} = beta1 m_k + (1 - beta1) g_k``, ``s_{k+1} = beta2 s_k + (1 - beta2) g_k^2``, and
    ``theta_{k+1} = theta_k - lr m' / sqrt(s' + eps)`` with ``m' = m_{k+1} / (1 - beta1^(k+1))``
    and ``s' = s_{k+1} / (1 - beta2^(k+1))``.

    ``eps`` stands INSIDE the square root, where ``torch.optim.Adam`` adds it outside: at a second
    moment of zero the derivative of ``sqrt(s)`` is infinite, that of ``sqrt(s + eps)`` is not. A
    gradient counts as small below ``sqrt(eps)``, 1e-4 by default.

    Args:
        betas: beta1 and beta2, each 0 to below 1; Reptile takes (0, 0.999).
        eps: above 0.
        weight_decay: at least 0: ``g_k + weight_decay theta_k`` stands for the gradient.

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
        first = self.beta1 * state[0] + (1 - self.beta1) * grads
        second = self.beta2 * state[1] + (1 - self.beta2) * grads.square()
        mean = first / (1 - self.beta1 ** (k + 1))
        size = (second / (1 - self.beta2 ** (k + 1)) + self.eps).sqrt()
        return theta - lr * mean / size, (first, second)


class PersistentAdam(Rule):
    """Adam with beta1 = 0 whose second moment goes on from one meta-batch to the next.

    The steps are ``Adam``'s, but a task begins with the mean over tasks of the second moments that
    the meta-batch before ended with, not with zero, and the correction of the bias counts the steps
    of all meta-batches. Adam begun anew goes ``lr`` far along its first gradient, however small;
    this one goes less far the smaller gradients have become. So does the code published with
    Reptile (Nichol et al. 2018), where one optimizer goes through all tasks.

    A learner says which inner loops are carried on: ``Reptile.meta_loss`` and ``meta_gradient``.
    Elsewhere, as in ``adapt_tasks``, inner loops start from the carried moment and leave it as it
    is. Nothing is differentiated through it.

    Args:
        module: whose trainable parameters it steps.
        beta2: 0 to below 1.
        eps: above 0, inside the square root.

    Attributes:
        second: the carried moment ``[P]``, a buffer; zeros at first.
        taken: the steps that it has seen, a buffer.

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

    def __init__(self, module: nn.Module, beta2: float = 0.999, eps: float = 1e-8) -> None:
        super().__init__()
        self._layout = layout = ParameterLayout.of(module)
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
        second = self.beta2 * state[0] + (1 - self.beta2) * grads.square()
        unbiased = second / (1 - self.beta2 ** (self.taken + (k + 1)).double())
        return theta - lr * grads / (unbiased + self.eps).sqrt(), (second,)

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
    as in ``Adam`` and for the same reason; ``torch.optim.RMSprop`` adds it outside.

    Args:
        alpha: 0 to below 1.
        eps: above 0.
        weight_decay: at least 0: ``g_k + weight_decay theta_k`` stands for the gradient.

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
        second = self.alpha * state[0] + (1 - self.alpha) * grads.square()
        return theta - lr * grads / (second + self.eps).sqrt(), (second,)
