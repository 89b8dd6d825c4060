"""iMAML's gradient to what the tasks share, against dense solves and converged unrolled loops."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev

import fastmeta as fm
from tests.helpers.learners import K, engine, problem
from tests.helpers.networks import (
    Tasks,
    build,
    classification,
    joined,
    regression,
    regressor,
    relative_error,
)

__all__ = ["engine", "problem"]  # fixtures

EXACT = 1e-9
STRENGTH, DAMPING = 3.0, 0.5


def by_dense_solves(
    net: nn.Module, tasks: Tasks, adapt: tuple[str, ...], params: Tensor, gauss_newton: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """The gradients to the adapted and to the shared parameters, at adapted parameters."""
    own = {name: p.detach() for name, p in net.named_parameters()}
    shared = {name: p for name, p in own.items() if name not in adapt}
    sizes = [own[name].numel() for name in adapt]

    def outputs(theta: Tensor, shared: dict[str, Tensor], x: Tensor) -> Tensor:
        pieces = zip(adapt, theta.split(sizes), strict=True)
        views = {name: piece.view_as(own[name]) for name, piece in pieces}
        return functional_call(net, {**shared, **views}, (x,))

    def loss(theta: Tensor, shared: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(outputs(theta, shared, x), y)

    to_theta, to_shared = [], {name: torch.zeros_like(p) for name, p in shared.items()}
    for theta, sx, sy, qx, qy in zip(params, *tasks, strict=True):
        if gauss_newton:
            jacobian = jacrev(outputs)(theta, shared, sx).flatten(0, 1)
            logits = outputs(theta, shared, sx).flatten()
            of_loss = hessian(lambda z, y=sy: F.cross_entropy(z.view(len(y), -1), y))(logits)
            curved = jacobian.T @ of_loss @ jacobian
        else:
            curved = hessian(loss)(theta, shared, sx, sy)
        eye = torch.eye(len(theta), dtype=theta.dtype, device=theta.device)
        system = (1 + DAMPING) * eye + curved / STRENGTH
        v = torch.linalg.solve(system, jacrev(loss)(theta, shared, qx, qy))
        to_theta.append(v)
        mixed = jacrev(jacrev(loss), 1)(theta, shared, sx, sy)
        direct = jacrev(loss, 1)(theta, shared, qx, qy)
        for name, total in to_shared.items():
            total += direct[name] - torch.tensordot(v, mixed[name], 1) / STRENGTH
    count = len(params)
    return torch.stack(to_theta).mean(0), {name: g / count for name, g in to_shared.items()}


def grads_of(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in net.named_parameters()}


@pytest.mark.parametrize("adapt", ["0.*", "2.*", "*bias"])
@pytest.mark.parametrize(
    "options",
    [{}, {"task_chunk": 2}, {"curvature": "ggn"}, {"hvp_mode": "forward"}],
    ids=["plain", "chunks", "ggn", "forward"],
)
def test_it_is_the_formula_at_any_adapted_parameters(options, adapt, problem, engine):
    net, tasks = problem
    every = {"regularization": STRENGTH, "cg_damping": DAMPING, "cg_steps": 60, "engine": engine}
    learner = fm.IMAML(net, 0.1, K, adapt=adapt, **every, **options)
    params = learner.adapt_tasks(*tasks[:2]).params.detach()
    to_theta, to_shared = by_dense_solves(
        net, tasks, learner.layout.names, params, options.get("curvature") == "ggn"
    )
    loss, _ = learner.meta_loss(*tasks)
    (2 * loss).backward()
    found = grads_of(net)
    assert relative_error(joined(found[n] for n in learner.layout.names), 2 * to_theta) < EXACT
    for name, expected in to_shared.items():
        assert relative_error(found[name], 2 * expected) < EXACT
    result = learner.meta_gradient(*tasks)
    assert set(result.shared_grads) == set(to_shared)
    result.assign_to(learner)
    for name, p in net.named_parameters():
        assert relative_error(2 * p.grad, found[name]) < EXACT


@pytest.mark.parametrize("strength", [0.5, 2.0])
def test_on_a_quadratic_it_is_the_derivative_of_the_solution(strength, engine, device):
    """``theta* = (H + lambda)^-1 (2 X' (y - b) / S + lambda theta_0)``, differentiated."""
    torch.manual_seed(0)
    net = nn.Linear(3, 1, dtype=torch.float64, device=device)
    tasks = Tasks(*(torch.randn(4, 6, n).double().to(device) for n in (3, 1, 3, 1)))
    eye, losses = torch.eye(3, dtype=torch.float64, device=device), []
    for sx, sy, qx, qy in zip(*tasks, strict=True):
        right = 2 * sx.T @ (sy[:, 0] - net.bias) / 6 + strength * net.weight[0]
        theta = torch.linalg.solve(2 * sx.T @ sx / 6 + strength * eye, right)
        losses.append((qx @ theta + net.bias - qy[:, 0]).square().mean())
    expected = torch.autograd.grad(torch.stack(losses).mean(), [net.weight, net.bias])
    options = {"regularization": strength, "cg_steps": 3, "engine": engine}
    learner = fm.IMAML(net, 0.1, 600, F.mse_loss, adapt="weight", **options)
    loss, _ = learner.meta_loss(*tasks)
    loss.backward()
    assert relative_error(loss, torch.stack(losses).mean()) < EXACT
    assert relative_error(net.weight.grad, expected[0]) < EXACT
    assert relative_error(net.bias.grad, expected[1]) < EXACT


class Tempered(nn.Module):
    """A learned loss of the inner loop."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor([0.2, -0.3], dtype=torch.float64))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        scale = self.log_scale.exp()
        return scale[0] * F.mse_loss(outputs, targets) + scale[1] * outputs.square().mean()


@pytest.mark.parametrize("adapt", [None, "0.*", "2.*"])
def test_it_is_the_limit_of_unrolled_steps(adapt, device):
    """For what a module shares, a learned inner loss, and a tensor that the queries' loss reads."""
    net, tasks, inner = regressor(device), regression(device), Tempered().to(device)
    factor = torch.tensor(1.4, dtype=torch.float64, device=device, requires_grad=True)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(factor * outputs, targets)

    options = {"loss": loss, "inner_loss": inner, "outer": [factor], "adapt": adapt}
    rule = fm.rules.Proximal(STRENGTH)
    sources = [*net.parameters(), *inner.parameters(), factor]
    unrolled = fm.MAML(net, 0.05, 250, rule=rule, engine="functional", **options)
    expected = torch.autograd.grad(unrolled.meta_loss(*tasks)[0], sources)
    learner = fm.IMAML(net, 0.05, 250, regularization=STRENGTH, cg_steps=40, **options)
    found = torch.autograd.grad(learner.meta_loss(*tasks)[0], sources)
    for actual, grad in zip(found, expected, strict=True):
        assert relative_error(actual, grad) < 1e-8
    result = learner.meta_gradient(*tasks)
    assert len(result.outer_grads) == 2
    assert relative_error(result.outer_grads[0], expected[-2]) < 1e-8
    assert relative_error(result.outer_grads[1], expected[-1]) < 1e-8


def test_first_order_leaves_the_solution_s_derivative_out(problem, engine):
    net, tasks = problem
    learner = fm.IMAML(net, 0.1, K, cg_steps=0, adapt="4.*", engine=engine)
    learner.meta_loss(*tasks)[0].backward()
    found = joined(p.grad for p in net.parameters())
    net.zero_grad()
    rule = fm.rules.Proximal(2.0)
    plain = fm.MAML(net, 0.1, K, True, rule=rule, adapt="4.*", engine=engine)
    plain.meta_loss(*tasks)[0].backward()
    assert relative_error(found, joined(p.grad for p in net.parameters())) < EXACT


def test_a_task_without_a_solution_is_first_order(device):
    """Beside tasks that have one."""

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return targets.mean() * outputs.square().mean() + outputs.mean()

    net = nn.Linear(1, 1, dtype=torch.float64, device=device)
    x = torch.ones(2, 3, 1, dtype=torch.float64, device=device)
    y = torch.tensor([-5.0, 5.0], dtype=torch.float64, device=device)[:, None, None].expand(2, 3, 1)
    tasks = Tasks(x, y, x, y)

    def shared_grad(cg_steps: int, which: slice) -> Tensor:
        options = {"adapt": "weight", "engine": "functional", "cg_steps": cg_steps}
        learner = fm.IMAML(net, 0.01, 1, loss, **options)
        return learner.meta_gradient(*(tensor[which] for tensor in tasks)).shared_grads["bias"]

    with pytest.warns(RuntimeWarning, match="in 1 of 2 tasks, whose solution is the right-hand"):
        found = shared_grad(3, slice(0, 2))
    expected = (shared_grad(0, slice(0, 1)) + shared_grad(3, slice(1, 2))) / 2
    assert relative_error(found, expected) < EXACT
    assert relative_error(shared_grad(0, slice(0, 2)), expected) > 0.01


def test_what_is_shared_and_an_outer_tensor_has_its_gradient_once(device):
    net, tasks = build("mlp", device), classification("mlp", device)
    for make in (fm.MAML, fm.IMAML):
        grads = []
        for outer in ([], [net[0].weight]):
            learner = make(net, 0.1, 2, adapt="4.*", outer=outer, engine="functional")
            grads.append(learner.meta_gradient(*tasks).shared_grads["0.weight"])
            (grad,) = torch.autograd.grad(learner.meta_loss(*tasks)[0], net[0].weight)
            assert relative_error(grad, grads[0]) < EXACT
        assert torch.equal(*grads)
