"""MAML's relatives: against theory where it gives the answer, and every option of each."""

from __future__ import annotations

import copy
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastmeta as fm
from fastmeta.learners.schedules import cosine_schedule
from tests.helpers.engines import step_sizes
from tests.helpers.learners import EXACT, K, engine, gradient, problem
from tests.helpers.networks import (
    Tasks,
    build,
    classification,
    regression,
    regressor,
    relative_error,
)
from tests.helpers.unrolled import meta_gradient

__all__ = ["engine", "problem"]  # fixtures

L, P = 6, 83  # layers and parameters of "mlp"


def unrolled(net: nn.Module, tasks: Tasks, lr: object, steps: int, **options: object):
    lr = torch.as_tensor(lr, dtype=torch.float64, device=tasks.support_x.device)
    result = meta_gradient(net, tasks, F.cross_entropy, lr, steps, **options)
    return torch.cat([g.flatten() for g in result.params.values()]), result


# FOMAML


def test_fomaml_is_first_order_maml(problem, engine):
    net, tasks = problem
    expected, _ = unrolled(net, tasks, 0.1, K, first_order=True)
    assert relative_error(gradient(fm.FOMAML(net, 0.1, K, engine=engine), tasks), expected) < EXACT


def test_fomaml_takes_mamls_options(problem):
    net, _ = problem
    learner = fm.FOMAML(net, 0.1, 2, F.mse_loss, learn_lr=True, task_chunk=2)
    assert (learner.steps, learner.loss, learner.task_chunk) == (2, F.mse_loss, 2)
    assert "lr" in dict(learner.named_parameters())
    with pytest.raises(TypeError, match="first_order"):
        fm.FOMAML(net, first_order=False)


# Meta-SGD


def test_meta_sgd_is_maml_with_a_step_size_an_element(problem, engine):
    net, tasks = problem
    learner = fm.MetaSGD(net, 0.1, K, engine=engine)
    with torch.no_grad():
        learner.lr.copy_(step_sizes(net))
    expected, by_hand = unrolled(net, tasks, step_sizes(net), K)
    assert relative_error(gradient(learner, tasks), expected) < EXACT
    assert relative_error(learner.lr.grad, by_hand.lr) < EXACT


def test_meta_sgd_starts_as_it_is_told(problem):
    net, _ = problem
    assert torch.equal(fm.MetaSGD(net, 0.2).lr, torch.full((P,), 0.2, dtype=torch.float64))
    torch.manual_seed(0)
    first = fm.MetaSGD(net).lr
    second = fm.MetaSGD(net).lr
    assert 0.005 <= first.min() < 0.02 < 0.09 < first.max() <= 0.1
    assert not torch.equal(first, second)
    assert fm.MetaSGD(net, (1.0, 2.0)).lr.min() >= 1


@pytest.mark.parametrize(
    ("lr", "error", "message"),
    [
        ("fast", TypeError, r"lr: expected a number or a pair \(low, high\), got 'fast'"),
        ((0.1,), TypeError, "lr: expected a number or a pair"),
        ((0.2, 0.1), ValueError, "lr: expected finite numbers, the lower one first"),
        (math.inf, ValueError, "lr: expected finite numbers"),
    ],
)
def test_bad_step_sizes_of_meta_sgd(lr, error, message):
    with pytest.raises(error, match=message):
        fm.MetaSGD(nn.Linear(3, 2), lr)


# Meta-Curvature


def test_meta_curvature_starts_as_maml(problem, engine):
    net, tasks = problem
    learner = fm.MetaCurvature(net, 0.1, K, engine=engine)
    assert relative_error(gradient(learner, tasks), unrolled(net, tasks, 0.1, K)[0]) < EXACT
    assert all(p.grad.abs().max() > 0 for p in learner.rule.parameters())


def test_meta_curvature_takes_its_steps_by_a_rule(problem):
    net, tasks = problem
    learner = fm.MetaCurvature(net, 0.1, K, rule=fm.rules.SGD(0.9))
    same = fm.MAML(net, 0.1, K, rule=fm.rules.SGD(0.9))
    assert relative_error(gradient(learner, tasks), gradient(same, tasks)) < EXACT
    assert fm.MetaCurvature(net, 0.1, first_order=True).first_order


def test_meta_curvature_learns_its_matrices(problem):
    net, tasks = problem
    learner = fm.MetaCurvature(net, 0.1)
    optimizer = torch.optim.SGD(learner.rule.parameters(), 0.5)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss, _ = learner.meta_loss(*tasks)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)


# MAML++


def plus_plus(net: nn.Module, **options: object) -> fm.MAMLPlusPlus:
    usual = {"multi_step_iterations": 0, "first_order_iterations": 0}
    return fm.MAMLPlusPlus(net, 0.1, K, **{**usual, **options})


def test_maml_plus_plus_with_equal_step_sizes_is_maml(problem, engine):
    net, tasks = problem
    learner = plus_plus(net, engine=engine)
    assert learner.lr.shape == (K, L)
    assert relative_error(gradient(learner, tasks), unrolled(net, tasks, 0.1, K)[0]) < EXACT
    assert learner.lr.grad.abs().min() > 0


def test_the_multi_step_loss_is_annealed(problem, engine):
    net, tasks = problem
    learner = plus_plus(net, multi_step_iterations=4, engine=engine)
    for t in (0.0, 0.25, 0.5, 0.75, 1.0, 1.0):
        share = (1 - t) / K
        weights = [share, share, share + t]
        expected, _ = unrolled(net, tasks, 0.1, K, step_weights=weights)
        assert relative_error(gradient(learner, tasks), expected) < EXACT
    assert learner.iteration == 6


def test_second_order_comes_after_the_first(problem, engine):
    net, tasks = problem
    learner = plus_plus(net, first_order_iterations=2, engine=engine)
    for first_order in (True, True, False, False):
        expected, _ = unrolled(net, tasks, 0.1, K, first_order=first_order)
        assert relative_error(gradient(learner, tasks), expected) < EXACT


def test_only_training_counts(problem):
    net, tasks = problem
    learner = plus_plus(net, multi_step_iterations=10)
    with torch.no_grad():
        learner.meta_loss(*tasks)
    learner.eval().meta_loss(*tasks)
    learner.eval().meta_gradient(*tasks)
    learner.train().adapt_tasks(*tasks[:2])
    assert learner.iteration == 0
    learner.meta_loss(*tasks)
    learner.meta_gradient(*tasks)
    assert learner.iteration == 2


def test_the_state_dict_knows_the_iteration(problem):
    net, tasks = problem
    options = {"multi_step_iterations": 4, "first_order_iterations": 2}
    learner, other = plus_plus(net, **options), plus_plus(copy.deepcopy(net), **options)
    for _ in range(3):
        learner.meta_loss(*tasks)
    other.load_state_dict(learner.state_dict())
    assert other.iteration == 3
    assert torch.equal(gradient(other, tasks), gradient(learner, tasks))


@pytest.mark.parametrize("steps", [1, K])
def test_a_single_step_has_one_weight(steps, problem):
    net, _ = problem
    learner = fm.MAMLPlusPlus(net, steps=steps, multi_step_iterations=2)
    assert learner.step_weights() == (None if steps == 1 else [1 / K] * K)


def test_the_outer_step_size_falls_by_a_cosine(problem):
    learner = plus_plus(problem[0])
    optimizer = torch.optim.Adam(learner.parameters(), 0.2)
    schedule, seen = learner.schedule(optimizer, 4), []
    for _ in range(6):
        optimizer.step()
        schedule.step()
        seen.append(optimizer.param_groups[0]["lr"])
    halves = [(1 + math.cos(math.pi * t)) / 2 for t in (0.25, 0.5, 0.75, 1, 1, 1)]
    assert seen == pytest.approx([0.2 * (0.01 + 0.99 * half) for half in halves], rel=1e-14)


def test_a_schedule_out_of_range_is_refused(problem):
    optimizer = torch.optim.Adam(problem[0].parameters())
    with pytest.raises(ValueError, match="iterations: expected at least 1, got 0"):
        cosine_schedule(optimizer, 0)
    with pytest.raises(ValueError, match="floor: expected a number from 0 to 1, got 2"):
        cosine_schedule(optimizer, 1, floor=2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps: expected at least 1, got 0"),
        ({"multi_step_iterations": -1}, ValueError, "multi_step_iterations: expected at least 0"),
        ({"first_order_iterations": 0.5}, TypeError, "first_order_iterations: expected an integer"),
        ({"lr": torch.ones(3)}, TypeError, "lr: expected a number, got Tensor"),
    ],
)
def test_bad_options_of_maml_plus_plus(options, error, message):
    with pytest.raises(error, match=message):
        fm.MAMLPlusPlus(nn.Linear(3, 2), **options)


def test_norms_of_each_step_are_those_that_they_replace(device):
    net = build("conv4", device)
    with torch.no_grad():
        net[1].weight.uniform_()
        net[1].bias.uniform_()
    net[1].bias.requires_grad_(False)
    net[5].eps = 0.1
    twin = fm.models.with_per_step_norms(net, steps=2)
    assert isinstance(net[1], nn.BatchNorm2d)
    assert twin[1].weight.shape == (3, 4)
    assert not twin[1].bias.requires_grad
    assert twin[0].weight is not net[0].weight
    x = classification("conv4", device).support_x[0]
    assert relative_error(twin(x), net(x)) < 1e-12
    tasks = classification("conv4", device)
    found = fm.MAML(twin, 0.1, 2).meta_loss(*tasks)[0]
    # No pass reads an adapted row again: as if the other's norms were not adapted.
    lr = {
        name: 0.0 if name.split(".")[0] in ("1", "5", "9", "13") else 0.1
        for name, p in net.named_parameters()
        if p.requires_grad
    }
    assert relative_error(found, fm.MAML(net, lr, 2).meta_loss(*tasks)[0]) < 1e-12
    with pytest.raises(ValueError, match="model: Linear has no BatchNorm1d or BatchNorm2d"):
        fm.models.with_per_step_norms(nn.Linear(3, 2), 1)


LEARNERS = [fm.FOMAML, fm.MetaSGD, fm.MetaCurvature, fm.MAMLPlusPlus, fm.Reptile, fm.IMAML]


@pytest.mark.parametrize("make", LEARNERS)
def test_every_learner_trains(make, device):
    net, tasks = regressor(device), regression(device, tasks=4, examples=10)
    tasks = tasks._replace(support_y=tasks.support_x.sin(), query_y=tasks.query_x.sin())
    learner = make(net, 0.01, 3, F.mse_loss)
    rate = 0.5 if make is fm.Reptile else 1e-2
    kind = torch.optim.SGD if make is fm.Reptile else torch.optim.Adam
    optimizer, losses = kind(learner.parameters(), rate), []
    torch.manual_seed(0)
    for _ in range(80):
        optimizer.zero_grad()
        loss, _ = learner.meta_loss(*tasks)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            adapted = learner.adapt_tasks(*tasks[:2])(tasks.query_x)
        losses.append(F.mse_loss(adapted, tasks.query_y).item())
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("kind", ["program", "functional", "auto"])
def test_threads_may_share_a_learner(kind):
    """Calls of the functional engine put each task's parameters into the module."""
    tasks = [classification("mlp", "cpu", tasks=count) for count in (2, 3, 5)]
    learner = fm.MAML(build("mlp", "cpu"), 0.1, 2, engine=kind)
    fresh = fm.MAML(build("mlp", "cpu"), 0.1, 2, engine=kind)
    expected = [fresh.meta_gradient(*batch).grads for batch in tasks]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(10):
            found = pool.map(lambda batch: learner.meta_gradient(*batch).grads, tasks)
            for actual, value in zip(found, expected, strict=True):
                torch.testing.assert_close(actual, value, rtol=1e-12, atol=1e-14)
