"""Adam whose second moment goes on from one meta-batch to the next."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad

import fastmeta as fm
from fastmeta.core.parameter_layout import ParameterLayout
from tests.helpers.learners import EXACT, engine, gradient, problem
from tests.helpers.networks import Tasks, relative_error

__all__ = ["engine", "problem"]  # fixtures

LR, BETA, EPS, STEPS = 0.03, 0.9, 1e-3, 3


def reptile(net: nn.Module, **options: object) -> fm.Reptile:
    options = {"rule": fm.rules.PersistentAdam(net, BETA, EPS), "inner_batch": None, **options}
    return fm.Reptile(net, LR, STEPS, **options)


def by_hand(net: nn.Module, x: Tensor, y: Tensor, second: Tensor, taken: int) -> tuple:
    """theta_K ``[T, P]`` of each task, and the mean of their second moments."""
    layout = ParameterLayout.of(net)
    start = layout.flatten(dict(net.named_parameters())).detach()
    ends, seconds = [], []
    for task_x, task_y in zip(x, y, strict=True):
        slope = grad(
            lambda at, x=task_x, y=task_y: F.cross_entropy(
                functional_call(net, layout.views(at), (x,)), y
            )
        )
        theta, s = start, second
        for k in range(STEPS):
            g = slope(theta)
            s = BETA * s + (1 - BETA) * g**2
            theta = theta - LR * g / (s / (1 - BETA ** (taken + k + 1)) + EPS).sqrt()
        ends.append(theta)
        seconds.append(s)
    return torch.stack(ends), torch.stack(seconds).mean(0)


def everything(tasks: Tasks) -> tuple[Tensor, Tensor]:
    return (
        torch.cat([tasks.support_x, tasks.query_x], 1),
        torch.cat([tasks.support_y, tasks.query_y], 1),
    )


@pytest.mark.parametrize("chunk", [None, 2])
def test_meta_batches_go_on_where_the_one_before_ended(problem, engine, chunk):
    net, tasks = problem
    learner = reptile(net, engine=engine, task_chunk=chunk)
    start = torch.nn.utils.parameters_to_vector(net.parameters()).detach()
    second, taken = torch.zeros_like(start), 0
    for _ in range(3):
        ends, second = by_hand(net, *everything(tasks), second, taken)
        taken += STEPS
        assert relative_error(gradient(learner, tasks), (start - ends).mean(0)) < EXACT
        assert relative_error(learner.rule.second, second) < EXACT
        assert learner.rule.taken == taken


def test_meta_gradient_carries_on_too(problem):
    net, tasks = problem
    learner, twin = reptile(net), copy.deepcopy(reptile(net))
    learner.meta_gradient(*tasks)
    gradient(twin, tasks)
    assert learner.rule.taken == STEPS
    assert torch.equal(learner.rule.second, twin.rule.second)


def test_adaptation_starts_from_the_moment_and_leaves_it(problem, engine):
    net, tasks = problem
    learner = reptile(net, engine=engine)
    gradient(learner, tasks)
    before = copy.deepcopy(learner.rule.state_dict())
    ends, _ = by_hand(net, *tasks[:2], before["second"], STEPS)
    assert relative_error(learner.adapt_tasks(*tasks[:2]).params, ends) < EXACT
    for name, tensor in learner.rule.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_first_meta_batch_is_as_with_adam_begun_anew(problem):
    net, tasks = problem
    anew = reptile(net, rule=fm.rules.Adam((0.0, BETA), EPS))
    assert relative_error(gradient(reptile(net), tasks), gradient(anew, tasks)) < EXACT
    carried = reptile(net)
    gradient(carried, tasks)
    assert relative_error(gradient(carried, tasks), gradient(anew, tasks)) > 0.01


def test_it_carries_on_inside_other_rules(problem):
    net, tasks = problem
    inside = fm.rules.PersistentAdam(net, BETA, EPS)
    wrapped = reptile(net, rule=fm.rules.ClipNorm(1e9, fm.rules.Proximal(0.0, inside)))
    plain = reptile(net)
    for _ in range(2):
        assert relative_error(gradient(wrapped, tasks), gradient(plain, tasks)) < EXACT
    assert torch.equal(inside.taken, plain.rule.taken)
    assert relative_error(inside.second, plain.rule.second) < EXACT


def test_a_meta_batch_that_fails_leaves_the_moment(problem):
    net, tasks = problem
    learner = reptile(net, task_chunk=1)
    bad = tasks._replace(support_y=tasks.support_y.clone())
    bad.support_y[-1, 0] = 99
    with pytest.raises((ValueError, IndexError)):
        learner.meta_loss(*bad)
    assert learner.rule.taken == 0 and not learner.rule.second.any()


def test_copies_and_checkpoints_keep_the_moment(problem):
    net, tasks = problem
    learner = reptile(net)
    gradient(learner, tasks)
    loaded = reptile(copy.deepcopy(net))
    loaded.load_state_dict(learner.state_dict())
    for twin in (loaded, copy.deepcopy(learner), pickle.loads(pickle.dumps(learner))):
        expected = copy.deepcopy(learner)
        assert torch.equal(gradient(twin, tasks), gradient(expected, tasks))
        assert twin.rule.taken == 2 * STEPS


def test_it_is_reptile_s_usual_rule():
    net = nn.Linear(3, 2)
    rule = fm.Reptile(net).rule
    assert isinstance(rule, fm.rules.PersistentAdam)
    assert (rule.beta2, rule.eps) == (0.999, 1e-8)
    assert rule.second.shape == (8,)


def test_bad_options():
    with pytest.raises(ValueError, match=r"beta2: expected a number in \[0, 1\), got 1"):
        fm.rules.PersistentAdam(nn.Linear(3, 2), 1.0)
    with pytest.raises(ValueError, match="eps: expected a number above 0, got 0"):
        fm.rules.PersistentAdam(nn.Linear(3, 2), eps=0.0)
    message = "rule: expected the trainable parameters that PersistentAdam was made for, weight"
    with pytest.raises(ValueError, match=message):
        fm.Reptile(nn.Linear(3, 2), rule=fm.rules.PersistentAdam(nn.Linear(2, 2)))
