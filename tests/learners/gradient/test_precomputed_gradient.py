"""Reptile and iMAML, which compute their meta-gradient without going back through the steps."""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta as fm
from fastmeta.engines.base import Examples
from fastmeta.learners.gradient._conjugate_gradients import conjugate_gradients
from tests.helpers.learners import EXACT, K, engine, gradient, problem
from tests.helpers.networks import Tasks, relative_error
from tests.helpers.programs import build as build_program
from tests.helpers.programs import tasks_for

__all__ = ["engine", "problem"]  # fixtures


# Reptile


def joint_gradient(net: nn.Module, tasks: Tasks) -> Tensor:
    """Of the mean over tasks of the loss on all of a task's examples."""
    losses = [
        F.cross_entropy(net(torch.cat([sx, qx])), torch.cat([sy, qy]))
        for sx, sy, qx, qy in zip(*tasks, strict=True)
    ]
    grads = torch.autograd.grad(torch.stack(losses).mean(), list(net.parameters()))
    return torch.cat([g.flatten() for g in grads])


def test_reptile_with_one_step_is_joint_training(problem, engine):
    net, tasks = problem
    options = {"inner_batch": None, "rule": fm.rules.SGD(), "engine": engine}
    learner = fm.Reptile(net, 0.1, 1, **options)
    assert relative_error(gradient(learner, tasks) / 0.1, joint_gradient(net, tasks)) < EXACT


def reptile_by_hand(net: nn.Module, tasks: Tasks, rows: Tensor, lr: float) -> Tensor:
    """theta_0 - theta_K of each task, by PyTorch's Adam with an epsilon that does not matter."""
    moved = []
    for sx, sy, qx, qy in zip(*tasks, strict=True):
        twin = copy.deepcopy(net)
        optimizer = torch.optim.Adam(twin.parameters(), lr, betas=(0.0, 0.999), eps=1e-15)
        x, y = torch.cat([sx, qx]), torch.cat([sy, qy])
        for batch in rows:
            optimizer.zero_grad()
            F.cross_entropy(twin(x[batch]), y[batch]).backward()
            optimizer.step()
        pairs = zip(net.parameters(), twin.parameters(), strict=True)
        moved.append(torch.cat([(a - b).flatten() for a, b in pairs]).detach())
    return torch.stack(moved)


def reptile(net: nn.Module, **options: object) -> fm.Reptile:
    rule = fm.rules.Adam((0.0, 0.999), eps=1e-30)
    return fm.Reptile(net, 0.01, K, rule=rule, **{"inner_batch": 4, **options})


def test_reptile_in_batches(problem, engine):
    net, tasks = problem
    with torch.no_grad():
        net[0].bias += 5  # no dead unit, whose Adam steps hang on the epsilon
    learner = reptile(net, engine=engine)
    torch.manual_seed(0)
    rows = learner._draw_indices(11)
    expected = reptile_by_hand(net, tasks, rows, 0.01).mean(0)
    assert relative_error(gradient(learner, tasks), expected) < EXACT


def test_reptile_of_one_task_after_another_is_its_serial_version(problem):
    net, tasks = problem
    with torch.no_grad():
        net[0].bias += 5
    twin, epsilon = copy.deepcopy(net), 0.5
    learner = reptile(net, inner_batch=None)
    outer = torch.optim.SGD(learner.parameters(), epsilon)
    rows = torch.arange(11).repeat(K, 1)
    for t in range(3):
        task = Tasks(*(tensor[t : t + 1] for tensor in tasks))
        outer.zero_grad()
        learner.meta_loss(*task)[0].backward()
        outer.step()
        moved = reptile_by_hand(twin, task, rows, 0.01)[0]
        with torch.no_grad():
            start = torch.nn.utils.parameters_to_vector(twin.parameters())
            torch.nn.utils.vector_to_parameters(start - epsilon * moved, twin.parameters())
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        assert relative_error(a, b) < EXACT


def test_the_examples_of_each_step_of_reptile(problem):
    learner = reptile(problem[0])
    rows = learner._draw_indices(11)
    assert rows.shape == (K, 4)
    assert len(set(rows.flatten()[:11].tolist())) == 11
    assert not torch.equal(learner._draw_indices(11), rows)
    assert learner._draw_indices(4) is None
    assert reptile(problem[0], inner_batch=None)._draw_indices(11) is None
    usual = fm.Reptile(problem[0])
    assert (usual.inner_batch, usual.steps, usual.lr, usual.first_order) == (10, 5, 1e-3, True)


def test_reptile_adapts_to_the_support_alone(problem):
    net, tasks = problem
    rule = fm.rules.Adam((0.0, 0.999), eps=1e-30)
    same = fm.MAML(net, 0.01, K, rule=rule).adapt_tasks(*tasks[:2]).params
    assert torch.equal(reptile(net).adapt_tasks(*tasks[:2]).params, same)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps: expected at least 1, got 0"),
        ({"inner_batch": 0}, ValueError, "inner_batch: expected at least 1, got 0"),
        ({"inner_batch": "all"}, TypeError, "inner_batch: expected an integer, got 'all'"),
        ({"rule": "adam"}, TypeError, "rule: expected a fastmeta.rules.Rule, got str"),
    ],
)
def test_bad_options_of_reptile(options, error, message):
    with pytest.raises(error, match=message):
        fm.Reptile(nn.Linear(3, 2), **options)


@pytest.mark.parametrize("kind", [fm.Reptile, fm.IMAML])
def test_what_would_get_no_gradient_is_refused(kind, problem):
    net, tasks = problem
    learned = kind(net, 0.1, steps=2, learn_lr=True)
    with pytest.raises(ValueError, match="lr: expected one that is not learned"):
        learned.meta_loss(*tasks)
    learned.lr.requires_grad_(False)
    assert learned.meta_loss(*tasks)[0].requires_grad
    rule = fm.rules.MetaCurvature(net)
    with pytest.raises(ValueError, match=r"rule\.\S+: expected one that is not learned"):
        kind(net, 0.1, steps=2, rule=rule).meta_gradient(*tasks)


# iMAML


def linear_tasks(device) -> tuple[nn.Module, Tasks]:
    generator = torch.Generator().manual_seed(2)

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)

    torch.manual_seed(0)
    net = nn.Linear(3, 1, bias=False).double().to(device)
    return net, Tasks(make(4, 6, 3), make(4, 6, 1), make(4, 5, 3), make(4, 5, 1))


def hypergradient(net: nn.Module, tasks: Tasks, strength: float, damping: float) -> Tensor:
    """In closed form: ``theta* = (H + lambda)^-1 (H b + lambda theta)`` of each task."""
    start, grads = net.weight.detach()[0], []
    for sx, sy, qx, qy in zip(*tasks, strict=True):
        hessian = 2 * sx.T @ sx / len(sx)
        system = hessian + strength * torch.eye(3, dtype=torch.float64, device=sx.device)
        theta = torch.linalg.solve(system, 2 * sx.T @ sy[:, 0] / len(sx) + strength * start)
        outer = 2 * qx.T @ (qx @ theta - qy[:, 0]) / len(qx)
        damped = system + damping * strength * torch.eye(3, dtype=torch.float64, device=sx.device)
        grads.append(strength * torch.linalg.solve(damped, outer))
    return torch.stack(grads).mean(0)


@pytest.mark.parametrize("strength", [0.5, 2.0])
@pytest.mark.parametrize("damping", [0.0, 1.5])
@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_imaml_on_a_quadratic_is_the_closed_form(curvature, damping, strength, engine, device):
    net, tasks = linear_tasks(device)
    options = {"regularization": strength, "cg_steps": 3, "cg_damping": damping, "engine": engine}
    learner = fm.IMAML(net, 0.1, 600, F.mse_loss, curvature=curvature, **options)
    expected = hypergradient(net, tasks, strength, damping)
    assert relative_error(gradient(learner, tasks), expected) < EXACT


def test_imaml_adapts_to_the_regularised_loss(engine, device):
    net, tasks = linear_tasks(device)
    learner = fm.IMAML(net, 0.1, 600, F.mse_loss, regularization=2.0, engine=engine)
    params = learner.adapt_tasks(*tasks[:2]).params.detach().requires_grad_()
    outputs = (tasks.support_x @ params[:, :, None] - tasks.support_y).square().mean((1, 2))
    total = (outputs + (params - net.weight).square().sum(1)).sum()
    assert torch.autograd.grad(total, params)[0].abs().max() < 1e-12


def test_imaml_with_no_products_is_first_order(problem):
    net, tasks = problem
    plain = fm.MAML(net, 0.1, K, True, rule=fm.rules.Proximal(2.0))
    learner = fm.IMAML(net, 0.1, K, cg_steps=0)
    assert relative_error(gradient(learner, tasks), gradient(plain, tasks)) < EXACT
    one, two = (gradient(fm.IMAML(net, 0.1, K, cg_steps=n), tasks) for n in (1, 2))
    assert relative_error(one, two) > 1e-6


def test_imaml_takes_its_steps_by_a_rule(problem):
    net, tasks = problem
    found = fm.IMAML(net, 0.1, K, rule=fm.rules.SGD(0.9)).adapt_tasks(*tasks[:2]).params
    rule = fm.rules.Proximal(2.0, fm.rules.SGD(0.9))
    assert torch.equal(found, fm.MAML(net, 0.1, K, rule=rule).adapt_tasks(*tasks[:2]).params)


def test_imaml_under_negative_curvature_is_first_order_and_says_so():
    """A loss with a maximum at 0: the gradient was 0 without a word."""

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return -5 * outputs.square().mean() + targets.mean()

    net = nn.Linear(1, 1, bias=False).double()
    x = torch.ones(2, 3, 1, dtype=torch.float64)
    options = {"regularization": 2.0, "engine": "functional"}
    learner = fm.IMAML(net, 0.01, 1, loss, **options)
    with pytest.warns(RuntimeWarning, match="in 2 of 2 tasks, whose solution is the right-hand"):
        found = gradient(learner, Tasks(x, x, x, x))
    first_order = fm.IMAML(net, 0.01, 1, loss, cg_steps=0, **options)
    assert relative_error(found, gradient(first_order, Tasks(x, x, x, x))) < EXACT


def test_imaml_with_the_gauss_newton_matrix_solves_its_system(engine, device):
    """Under strong curvature of the network, where the Hessian's system is not positive."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double().to(device)
    x, y = torch.randn(2, 2, 6, 2, dtype=torch.float64), 9 * torch.randn(2, 2, 6, 1).double()
    x, y = x.to(device), y.to(device)
    options = {"regularization": 0.01, "cg_steps": 60, "engine": engine}
    learner = fm.IMAML(net, 1e-3, 2, F.mse_loss, curvature="ggn", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = gradient(learner, Tasks(x[0], y[0], x[1], y[1]))
    adapted = learner.adapt_tasks(x[0], y[0]).params.detach()
    basis = torch.eye(13, dtype=torch.float64, device=device)[:, None].expand(13, 2, 13)
    matrices = learner.ggnvp(adapted, (x[0], y[0]), basis).transpose(0, 1)
    _, _, grads, _ = learner._engine.query_losses(adapted, Examples(x[1], y[1], "query"), True)
    expected = torch.linalg.solve(basis[:, 0] + matrices / 0.01, grads)
    assert relative_error(found, expected.mean(0)) < 1e-7
    with pytest.warns(RuntimeWarning, match="not positive along"):
        gradient(fm.IMAML(net, 1e-3, 2, F.mse_loss, **options), Tasks(x[0], y[0], x[1], y[1]))


def test_conjugate_gradients_stop_where_there_is_nothing_to_do():
    matrix = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    b = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    signs = torch.tensor([[1.0], [1.0], [-1.0]], dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match="not positive along .* in 1 of 3 tasks"):
        x, solved = conjugate_gradients(lambda v: signs * (v @ matrix), b, 10)
    expected = torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(x, expected, rtol=1e-12, atol=1e-14)
    assert solved.flatten().tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"regularization": 0.0}, ValueError, "regularization: expected a finite number above 0"),
        ({"regularization": math.inf}, ValueError, "regularization: .* got inf"),
        ({"regularization": "2"}, TypeError, "regularization: expected a number, got str"),
        ({"curvature": "fisher"}, ValueError, "curvature: expected one of .* got 'fisher'"),
        ({"cg_steps": -1}, ValueError, "cg_steps: expected at least 0, got -1"),
        ({"cg_steps": 1.5}, TypeError, "cg_steps: expected an integer, got 1.5"),
        ({"cg_damping": -0.5}, ValueError, "cg_damping: expected at least 0, got -0.5"),
        ({"cg_damping": "1"}, TypeError, "cg_damping: expected a number, got str"),
    ],
)
def test_bad_options_of_imaml(options, error, message):
    with pytest.raises(error, match=message):
        fm.IMAML(nn.Linear(3, 2), **options)


# Those with a meta-gradient of their own


@pytest.mark.parametrize("make", [fm.Reptile, fm.IMAML])
def test_their_tasks_can_run_in_chunks(make, problem, engine):
    net, tasks = problem
    whole, parts = (
        gradient(make(net, 0.1, K, engine=engine, task_chunk=chunk), tasks) for chunk in (None, 2)
    )
    assert relative_error(parts, whole) < 1e-12


@pytest.mark.parametrize("rule", [None, fm.rules.SGD(0.5)], ids=["plain", "momentum"])
def test_query_losses_at_given_parameters(rule, engine, device):
    """As after K steps, for networks with parameters of each step too."""
    net = build_program("norms_of_each_step", device)
    tasks = tasks_for("norms_of_each_step", "mse", device)
    learner = fm.MAML(net, 0.1, K, loss=F.mse_loss, rule=rule, engine=engine, task_chunk=2)
    params = learner.adapt_tasks(*tasks[:2]).params.detach().requires_grad_()
    losses, outputs, grads, _ = learner._engine.query_losses(
        params, Examples(*tasks[2:], role="query"), gradient=True
    )
    plain = fm.MAML(net, 0.1, K, loss=F.mse_loss, engine="functional").adapt_tasks(*tasks[:2])
    expected = dataclasses.replace(plain, params=params)(tasks.query_x)
    own = (expected - tasks.query_y).square().mean((1, 2))
    assert relative_error(outputs, expected) < EXACT
    assert relative_error(losses, own) < EXACT
    assert relative_error(grads, torch.autograd.grad(own.sum(), params)[0]) < EXACT
    assert learner._engine.query_losses(params, Examples(*tasks[2:], role="query"))[2] is None


@pytest.mark.parametrize("make", [fm.Reptile, fm.IMAML])
def test_given_gradients(make, problem):
    net, tasks = problem
    learner = make(net, 0.1, K, rule=fm.rules.Adam((0.0, 0.999)))  # that carries nothing on
    torch.manual_seed(0)
    once = gradient(learner, tasks).clone()
    torch.manual_seed(0)
    loss, logits = learner.meta_loss(*tasks)
    assert not logits.requires_grad
    (3 * loss).backward()
    found = torch.cat([p.grad.flatten() for p in net.parameters()])
    assert relative_error(found, 4 * once) < 1e-12
    grads = torch.autograd.grad(learner.meta_loss(*tasks)[0], net[0].weight, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        grads[0].sum().backward()
    with torch.no_grad():
        assert not learner.meta_loss(*tasks)[0].requires_grad
    assert torch.equal(learner.adapt_tasks(*tasks[:2], steps=0).params[0], learner_theta(net))
    with pytest.raises(ValueError, match=r"support_x: .* at least one task"):
        learner.meta_loss(*(tensor[:0] for tensor in tasks))


def learner_theta(net: nn.Module) -> Tensor:
    return torch.cat([p.flatten() for p in net.parameters()])


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_imaml_solves_one_system_with_dropout(curvature, monkeypatch, device):
    """Enough conjugate gradients solve a system exactly, if its matrix stays what it is."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 2))
    net = net.double().to(device)
    x, y = torch.randn(2, 9, 3).double().to(device), torch.randint(0, 2, (2, 9), device=device)
    learner = fm.IMAML(net, 0.1, steps=1, cg_steps=40, regularization=5.0, curvature=curvature)
    systems = []

    def recorded(product, vector, steps):
        solution, solved = conjugate_gradients(product, vector, steps)
        systems.append((product(solution) - vector).norm() / vector.norm())
        return solution, solved

    monkeypatch.setattr("fastmeta.learners.gradient.imaml.conjugate_gradients", recorded)
    learner.meta_gradient(x, y, x, y)
    assert systems[0] < 1e-8
