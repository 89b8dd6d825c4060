"""Inner rules written out for one task, and their meta-gradient by an unrolled graph."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

import fastmeta as fm
from fastmeta.core.parameter_layout import ParameterLayout
from tests.helpers.networks import Tasks
from tests.helpers.unrolled import Loss, twice_differentiable

# theta, gradient [P], lr, the state of a task (written to), k -> theta
Update = Callable[[Tensor, Tensor, Tensor, dict, int], Tensor]


@dataclass
class Case:
    """A rule of the library, the same rule written by hand, and their learned hyperparameters."""

    rule: fm.rules.Rule
    update: Update
    learned: dict[str, nn.Parameter] = field(default_factory=dict)


class RuleGradient(NamedTuple):
    loss: Tensor
    logits: Tensor
    theta: Tensor
    lr: Tensor
    support_x: Tensor | None
    query_x: Tensor
    learned: dict[str, Tensor]


def number(value: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(value, dtype=torch.float64))


def momentum(nesterov: bool = False) -> Case:
    mu, decay = number(0.8), number(0.05)
    rule = fm.rules.SGD(mu, nesterov, decay)

    def update(theta, g, lr, state, k):
        d = g + decay * theta
        state["m"] = mu * state.get("m", 0) + d
        return theta - lr * (d + mu * state["m"] if nesterov else state["m"])

    return Case(rule, update, {"momentum": mu, "weight_decay": decay})


def adam() -> Case:
    b1, b2, eps, decay = number(0.7), number(0.9), number(1e-3), number(0.02)

    def update(theta, g, lr, state, k):
        g = g + decay * theta
        state["m"] = b1 * state.get("m", 0) + (1 - b1) * g
        state["s"] = b2 * state.get("s", 0) + (1 - b2) * g**2
        m, s = state["m"] / (1 - b1 ** (k + 1)), state["s"] / (1 - b2 ** (k + 1))
        return theta - lr * m * (s + eps) ** -0.5

    learned = {"beta1": b1, "beta2": b2, "eps": eps, "weight_decay": decay}
    return Case(fm.rules.Adam((b1, b2), eps, decay), update, learned)


def rmsprop() -> Case:
    alpha, eps, decay = number(0.8), number(1e-3), number(0.02)

    def update(theta, g, lr, state, k):
        g = g + decay * theta
        state["s"] = alpha * state.get("s", 0) + (1 - alpha) * g**2
        return theta - lr * g * (state["s"] + eps) ** -0.5

    learned = {"alpha": alpha, "eps": eps, "weight_decay": decay}
    return Case(fm.rules.RMSProp(alpha, eps, decay), update, learned)


def clipped_value() -> Case:
    limit = number(0.03)

    def update(theta, g, lr, state, k):
        return theta - lr * torch.where(g.abs() > limit, limit * g.sign(), g)

    return Case(fm.rules.ClipValue(limit), update, {"limit": limit})


def clipped_norm() -> Case:
    limit, mu = number(0.2), number(0.5)

    def update(theta, g, lr, state, k):
        norm = g.square().sum().sqrt()
        state["m"] = mu * state.get("m", 0) + (g * limit / norm if norm > limit else g)
        return theta - lr * state["m"]

    rule = fm.rules.ClipNorm(limit, fm.rules.SGD(mu))
    return Case(rule, update, {"limit": limit, "rule.momentum": mu})


def proximal() -> Case:
    strength, mu = number(0.7), number(0.5)

    def update(theta, g, lr, state, k):
        start = state.setdefault("start", theta)
        state["m"] = mu * state.get("m", 0) + g + strength * (theta - start)
        return theta - lr * state["m"]

    rule = fm.rules.Proximal(strength, fm.rules.SGD(mu))
    return Case(rule, update, {"strength": strength, "rule.momentum": mu})


def carried_adam(net: nn.Module) -> Case:
    """Make persistent Adam in the middle of a training, inside another rule with a state."""
    carried, strength = fm.rules.PersistentAdam(net, 0.9, 1e-3), number(0.7)
    generator = torch.Generator().manual_seed(9)
    carried.second.copy_(0.01 * torch.rand(len(carried.second), generator=generator))
    carried.taken.fill_(7)

    def update(theta, g, lr, state, k):
        g = g + strength * (theta - state.setdefault("start", theta))
        state["s"] = 0.9 * state.get("s", carried.second) + 0.1 * g**2
        return theta - lr * g * (state["s"] / (1 - 0.9 ** (8 + k)) + 1e-3) ** -0.5

    return Case(fm.rules.Proximal(strength, carried), update, {"strength": strength})


def meta_curvature(net: nn.Module) -> Case:
    rule, layout = fm.rules.MetaCurvature(net), ParameterLayout.of(net)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for p in rule.parameters():
            p += 0.2 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)

    def update(theta, g, lr, state, k):
        changed = {}
        for (name, view), matrices in zip(layout.views(g).items(), rule.factors, strict=True):
            sizes = [len(m) for m in matrices]
            product = matrices[0]
            for m in list(matrices)[1:]:
                product = torch.kron(product, m)
            assert product.shape[0] == view.numel() and len(sizes) <= 3
            changed[name] = (product @ view.flatten()).view_as(view)
        return theta - lr * layout.flatten(changed)

    return Case(rule, update, dict(rule.named_parameters()))


# name -> the case of a network
CASES: dict[str, Callable[[nn.Module], Case]] = {
    "momentum": lambda net: momentum(),
    "nesterov": lambda net: momentum(nesterov=True),
    "adam": lambda net: adam(),
    "rmsprop": lambda net: rmsprop(),
    "clip_value": lambda net: clipped_value(),
    "clip_norm": lambda net: clipped_norm(),
    "proximal": lambda net: proximal(),
    "meta_curvature": meta_curvature,
    "carried_adam": carried_adam,
}


def rule_gradient(
    net: nn.Module,
    tasks: Tasks,
    loss: Loss,
    lr: Tensor,
    steps: int,
    case: Case,
    first_order: bool = False,
    step_weights: Sequence[float] | None = None,
) -> RuleGradient:
    """Loop over tasks and steps with ``create_graph=True``, and differentiate the graph.

    ``lr`` broadcasts to ``[P]``, or to ``[K, P]`` if it has two dimensions.
    """
    net, layout = copy.deepcopy(net), ParameterLayout.of(net)
    theta = layout.flatten(dict(net.named_parameters())).detach().requires_grad_()
    lr = lr.detach().requires_grad_()
    support_x, query_x = (x.detach().requires_grad_() for x in (tasks.support_x, tasks.query_x))
    losses, logits = [], []

    def outputs(at: Tensor, x: Tensor) -> Tensor:
        return functional_call(net, layout.views(at), (x,))

    with twice_differentiable():
        for t in range(len(support_x)):
            fast, state, weighted = theta, {}, []
            for k in range(steps):
                value = loss(outputs(fast, support_x[t]), tasks.support_y[t])
                g = torch.autograd.grad(value, fast, create_graph=True)[0]
                g = g.detach() if first_order else g
                fast = case.update(fast, g, lr[k] if lr.ndim == 2 else lr, state, k)
                if step_weights is not None:
                    value = loss(outputs(fast, query_x[t]), tasks.query_y[t])
                    weighted.append(step_weights[k] * value)
            logits.append(outputs(fast, query_x[t]))
            losses.append(sum(weighted) if weighted else loss(logits[-1], tasks.query_y[t]))
        total = torch.stack(losses).mean()
        inputs = [theta, lr, support_x, query_x, *case.learned.values()]
        grads = torch.autograd.grad(total, inputs, allow_unused=True)
    learned = {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(case.learned.items(), grads[4:], strict=True)
    }
    return RuleGradient(total.detach(), torch.stack(logits).detach(), *grads[:4], learned)
