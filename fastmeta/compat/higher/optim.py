"""Differentiable optimizers, as in ``higher.optim``: SGD, Adam and RMSprop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fastmeta.compat.higher.patch import Device, Functional
from fastmeta.rules.base import decayed, is_zero

Override = Mapping[str, Sequence[Any]]
Gradients = Sequence[Tensor | None]
GradCallback = Callable[[Gradients], Gradients]
Settings = Mapping[str, Any]
State = dict[str, Any]


class DifferentiableOptimizer:
    """An optimizer of ``torch.optim`` whose steps make new parameters, differentiably.

    A subclass implements ``updated``, the update of one parameter.

    Args:
        other: the optimizer whose settings and state are copied; it is not changed.
        reference_params: all parameters of the network that ``other`` optimizes.
        fmodel: the functional network whose parameters ``step`` updates; None: ``step`` takes them
            as an argument.
        device, override, track_higher_grads: as for ``innerloop_ctx``.
        grad_callback: function that ``step`` first applies to the gradients, such as clipping. It
            takes and returns a list in the order of ``reference_params``, with None for frozen and
            unused parameters.

    Attributes:
        param_groups: the settings of each parameter group.
        state: for each group a dict with the state of each parameter.

    Raises:
        ValueError: an override of an unknown name or length; a parameter that is not among
            ``reference_params``.
    """

    def __init__(
        self,
        other: torch.optim.Optimizer,
        reference_params: Iterable[Tensor],
        fmodel: Functional | None = None,
        device: Device = None,
        override: Override | None = None,
        grad_callback: GradCallback | None = None,
        track_higher_grads: bool = True,
    ) -> None:
        index = {p: i for i, p in enumerate(reference_params)}
        groups = other.param_groups
        missing = sum(p not in index for group in groups for p in group["params"])
        if missing:
            raise ValueError(
                f"reference_params: {missing} of the optimizer's parameters are not among them"
            )
        self._indices = [[index[p] for p in group["params"]] for group in groups]
        self.param_groups = [
            {name: value for name, value in group.items() if name != "params"} for group in groups
        ]
        self._apply_override(override)
        self.state: list[dict[int, State]] = [
            {
                k: _copy_of_state(other.state[p], device) if p in other.state else {}
                for k, p in enumerate(group["params"])
            }
            for group in groups
        ]
        self._fmodel = fmodel
        self._grad_callback = grad_callback
        self._track_higher_grads = track_higher_grads

    def step(
        self,
        loss: Tensor,
        params: Iterable[Tensor] | None = None,
        override: Override | None = None,
        grad_callback: GradCallback | None = None,
    ) -> list[Tensor]:
        """Take one step on a loss: ``zero_grad``, ``backward`` and ``step`` of other optimizers.

        Parameters on which the loss does not depend, frozen parameters, and parameters of no group
        are unchanged.

        Args:
            loss: scalar, computed with the functional network.
            params: the parameters; None: the network's own.
            override: as for ``innerloop_ctx``, for this and all later steps.
            grad_callback: for this step, instead of the optimizer's own.

        Returns:
            The new parameters, which are also the network's.

        Raises:
            ValueError: no parameters, a loss that was computed without gradients, or another
                number of gradients from ``grad_callback``.
        """
        self._apply_override(override)
        if params is None:
            if self._fmodel is None:
                raise ValueError("params: expected the parameters, as there is no fmodel")
            params = self._fmodel.fast_params
        old = list(params)
        grads = self._gradients(loss, old, grad_callback or self._grad_callback)
        new = list(old)
        with torch.set_grad_enabled(self._track_higher_grads):
            for group, states, indices in zip(
                self.param_groups, self.state, self._indices, strict=True
            ):
                for k, i in enumerate(indices):
                    grad = grads[i]
                    if grad is not None:
                        grad = -grad if group.get("maximize") else grad
                        new[i] = self.updated(old[i], grad, group, states[k])
        if not self._track_higher_grads:
            new = [
                p.detach().requires_grad_(q.requires_grad) for p, q in zip(new, old, strict=True)
            ]
        if self._fmodel is not None:
            self._fmodel.update_params(new)
        return new

    def updated(self, p: Tensor, grad: Tensor, group: Settings, state: State) -> Tensor:
        """Compute the new value of one parameter by differentiable operations.

        Args:
            p, grad: the parameter and its gradient.
            group: the settings of its group, some of which may be tensors.
            state: the parameter's state from step to step, to be updated.
        """
        raise NotImplementedError(f"{type(self).__name__} has no update")

    def _gradients(
        self, loss: Tensor, params: list[Tensor], callback: GradCallback | None
    ) -> Gradients:
        if not loss.requires_grad:
            raise ValueError(
                "loss: expected one that was computed with gradients enabled from the functional "
                "network's parameters, got a tensor that does not require grad"
            )
        trainable = [p for p in params if p.requires_grad]
        track = self._track_higher_grads
        computed = iter(torch.autograd.grad(loss, trainable, create_graph=track, allow_unused=True))
        grads: Gradients = [next(computed) if p.requires_grad else None for p in params]
        if callback is not None:
            grads = list(callback(grads))
        if len(grads) != len(params):
            raise ValueError(
                f"grad_callback: expected {len(params)} returned gradients, got {len(grads)}"
            )
        return grads

    def _apply_override(self, override: Override | None) -> None:
        for name, values in (override or {}).items():
            if len(values) not in (1, len(self.param_groups)):
                raise ValueError(
                    f"override: expected one value of {name!r}, or one for each of "
                    f"{len(self.param_groups)} parameter groups, got {len(values)}"
                )
            for i, group in enumerate(self.param_groups):
                if name not in group:
                    raise ValueError(
                        f"override: expected one of the settings {list(group)}, got {name!r}"
                    )
                group[name] = values[i if len(values) > 1 else 0]


class DifferentiableSGD(DifferentiableOptimizer):
    """``torch.optim.SGD``, with momentum, dampening, Nesterov's step and weight decay."""

    def updated(self, p: Tensor, grad: Tensor, group: Settings, state: State) -> Tensor:
        grad = decayed(grad, p, group["weight_decay"])
        momentum = group["momentum"]
        if not is_zero(momentum):
            before = state.get("momentum_buffer")
            fresh = grad if before is None else (1 - group["dampening"]) * grad
            velocity = fresh if before is None else momentum * before + fresh
            state["momentum_buffer"] = velocity
            grad = grad + momentum * velocity if group["nesterov"] else velocity
        return _descended(p, group["lr"], grad)


class DifferentiableAdam(DifferentiableOptimizer):
    """``torch.optim.Adam``, with AMSGrad and weight decay.

    The square root has the derivative zero at a second moment of zero, as in higher.
    """

    def updated(self, p: Tensor, grad: Tensor, group: Settings, state: State) -> Tensor:
        beta1, beta2 = group["betas"]
        grad = decayed(grad, p, group["weight_decay"])
        k = state["step"] = int(state.get("step", 0)) + 1
        first = state.get("exp_avg", 0.0) * beta1 + (1 - beta1) * grad
        second = state.get("exp_avg_sq", 0.0) * beta2 + (1 - beta2) * grad * grad
        state["exp_avg"], state["exp_avg_sq"] = first, second
        if group["amsgrad"]:
            before = state.get("max_exp_avg_sq")
            second = second if before is None else torch.maximum(before, second)
            state["max_exp_avg_sq"] = second
        scale = _root(second) + group["eps"]
        step_size = group["lr"] * (1 - beta2**k) ** 0.5 / (1 - beta1**k)
        return _descended(p, step_size, first / scale)


class DifferentiableRMSprop(DifferentiableOptimizer):
    """``torch.optim.RMSprop``, with momentum, centring and weight decay.

    The square root has the derivative zero at zero.
    """

    def updated(self, p: Tensor, grad: Tensor, group: Settings, state: State) -> Tensor:
        alpha = group["alpha"]
        grad = decayed(grad, p, group["weight_decay"])
        second = state.get("square_avg", 0.0) * alpha + (1 - alpha) * grad * grad
        state["square_avg"] = second
        if group["centered"]:
            mean = state.get("grad_avg", 0.0) * alpha + (1 - alpha) * grad
            state["grad_avg"] = mean
            second = second - mean * mean
        direction = grad / (_root(second) + group["eps"])
        if not is_zero(group["momentum"]):
            direction = state.get("momentum_buffer", 0.0) * group["momentum"] + direction
            state["momentum_buffer"] = direction
        return _descended(p, group["lr"], direction)


_DIFFERENTIABLE: dict[type[torch.optim.Optimizer], type[DifferentiableOptimizer]] = {
    torch.optim.SGD: DifferentiableSGD,
    torch.optim.Adam: DifferentiableAdam,
    torch.optim.RMSprop: DifferentiableRMSprop,
}


def get_diff_optim(
    opt: torch.optim.Optimizer,
    reference_params: Iterable[Tensor],
    fmodel: Functional | None = None,
    device: Device = None,
    override: Override | None = None,
    track_higher_grads: bool = True,
    grad_callback: GradCallback | None = None,
) -> DifferentiableOptimizer:
    """The differentiable counterpart of an optimizer.

    Args:
        opt: an SGD, Adam or RMSprop of ``torch.optim``.
        reference_params, fmodel, device, override, track_higher_grads, grad_callback: as for
            ``DifferentiableOptimizer``.

    Raises:
        ValueError: another optimizer; and as ``DifferentiableOptimizer``.
    """
    kind = _differentiable(opt)
    return kind(opt, reference_params, fmodel, device, override, grad_callback, track_higher_grads)


def get_trainable_opt_params(
    opt: torch.optim.Optimizer, device: Device = None
) -> dict[str, list[Any]]:
    """The optimizer's numbers as learnable tensors: an ``override`` for ``innerloop_ctx``.

    Args:
        opt: any optimizer; flags (bool) are left out.
        device: device of the tensors.

    Example:
        >>> import torch
        >>> import fastmeta.compat.higher as higher
        >>> inner = torch.optim.SGD(torch.nn.Linear(3, 1).parameters(), lr=0.5)
        >>> higher.optim.get_trainable_opt_params(inner)["lr"]
        [tensor(0.5000, requires_grad=True)]
    """

    def learned(value: float) -> Tensor:
        return torch.tensor(float(value), device=device, requires_grad=True)

    override: dict[str, list[Any]] = {}
    for group in opt.param_groups:
        for name, value in group.items():
            if name != "params" and all(_is_number(leaf) for leaf in tree_leaves(value)):
                override.setdefault(name, []).append(tree_map(learned, value))
    return override


def apply_trainable_opt_params(opt: torch.optim.Optimizer, override: Override) -> None:
    """Write learned settings back into an optimizer, as numbers.

    Args:
        opt: the optimizer.
        override: settings as for ``innerloop_ctx``.

    Raises:
        ValueError: neither one value nor one value for each parameter group.
    """
    for name, values in override.items():
        if len(values) not in (1, len(opt.param_groups)):
            raise ValueError(
                f"override: expected one value of {name!r}, or one for each of "
                f"{len(opt.param_groups)} parameter groups, got {len(values)}"
            )
        for i, group in enumerate(opt.param_groups):
            value = values[i if len(values) > 1 else 0]
            group[name] = tree_map(lambda x: x.item() if isinstance(x, Tensor) else x, value)


def _differentiable(opt: torch.optim.Optimizer) -> type[DifferentiableOptimizer]:
    kind = type(opt)
    if any(group.get("decoupled_weight_decay") for group in opt.param_groups):
        raise ValueError("opt: expected no decoupled_weight_decay (AdamW), got True")
    if kind not in _DIFFERENTIABLE:
        known = ", ".join(optimizer.__name__ for optimizer in _DIFFERENTIABLE)
        raise ValueError(f"opt: expected one of {known} of torch.optim, got {kind.__name__}")
    return _DIFFERENTIABLE[kind]


def _copy_of_state(state: Mapping[str, Any], device: Device) -> State:
    def copy(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.detach().clone().to(value.device if device is None else device)

    return {name: copy(value) for name, value in state.items() if value is not None}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _descended(p: Tensor, lr: float | Tensor, direction: Tensor) -> Tensor:
    if isinstance(lr, Tensor):
        return p - lr * direction
    return torch.add(p, direction, alpha=-lr)


def _root(x: Tensor) -> Tensor:
    """The square root; zero with a derivative of zero if x is zero or rounded below zero."""
    at_zero = x <= 0
    # The inner where keeps the infinite derivative of sqrt(0) out of the graph.
    return torch.where(at_zero, 0.0, torch.where(at_zero, 1.0, x).sqrt())
