"""What the learners that compare embeddings share: statistics, tasks of a result, autocast."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import fastmeta as fm
from tests.helpers.episodes import QUERIES, TASKS, WAYS, encoder, episode, exact

LEARNERS: dict[str, Callable[..., nn.Module]] = {
    "protonet": fm.ProtoNet,
    "matching": fm.MatchingNet,
    "siamese": lambda net, **options: fm.SiameseNet(net, 6, **options),
    "relation": lambda net, **options: fm.RelationNet(net, relation(), **options),
}

EVERY = pytest.mark.parametrize("name", LEARNERS)


def relation() -> nn.Module:
    torch.manual_seed(1)
    return fm.models.RelationMLP(6, 8)


def of(name: str, device: str, **options) -> nn.Module:
    """A learner whose encoder is a norm with running statistics."""
    norm = nn.BatchNorm1d(6)
    nn.init.normal_(norm.running_mean)
    return LEARNERS[name](norm, **options).double().to(device)


@EVERY
def test_batch_statistics_are_those_of_a_call(name, device):
    batch = episode(device)
    learner = of(name, device, norm_statistics="batch")
    running = of(name, device)
    running.load_state_dict(learner.state_dict())
    trained = learner.meta_loss(*batch)
    learner.load_state_dict(running.state_dict())
    found = learner.eval().meta_loss(*batch)
    exact(found[0], trained[0])
    exact(found[1], trained[1])
    for ours, theirs in zip(learner.buffers(), running.buffers(), strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.allclose(running.eval().meta_loss(*batch)[1], found[1])
    # As a norm of that kind: by the queries of one call.
    query = batch[2].flatten(0, 1)
    exact(learner(query), nn.functional.batch_norm(query, None, None, training=True))
    assert "Transductive" in learner.explain() and "Transductive" not in running.explain()


@EVERY
def test_statistics_are_restored_after_an_error(name, device):
    learner = of(name, device, norm_statistics="batch").eval()
    before = copy.deepcopy(learner.state_dict())
    batch = episode(device, shape=(7,))
    with pytest.raises(RuntimeError, match=r"BatchNorm1d fails on torch\.float64 of shape"):
        learner.meta_loss(*batch)
    assert learner.encoder.track_running_stats
    for name_, value in learner.state_dict().items():
        assert torch.equal(value, before[name_])


def test_a_learner_without_norms_is_not_transductive():
    assert not fm.ProtoNet(nn.Identity(), norm_statistics="batch").is_transductive


@EVERY
def test_one_task_of_a_result(name, device):
    batch, learner = episode(device), of(name, device).eval()
    adapted = learner.adapt_tasks(*batch[:2], num_classes=WAYS + 1)
    assert len(adapted) == TASKS
    logits = adapted(batch[2])
    assert (logits[..., WAYS] == -torch.inf).all()
    for index in (0, 1, -1):
        one = adapted.task(index)
        assert type(one) is type(adapted) and one.learner is learner
        exact(one(batch[2][index][None])[0], logits[index])
    with pytest.raises(IndexError, match="index: expected a task of 2, got 2"):
        adapted.task(2)


@EVERY
def test_no_tasks_and_no_queries(name, device):
    batch, learner = episode(device), of(name, device).eval()
    none = learner.adapt_tasks(*(x[:0] for x in batch[:2]), num_classes=WAYS)
    assert none(batch[2][:0]).shape == (0, WAYS * QUERIES, WAYS)
    adapted = learner.adapt_tasks(*batch[:2])
    assert adapted(batch[2][:, :0]).shape == (TASKS, 0, WAYS)


@EVERY
def test_adapted_logits_are_differentiable(name, device):
    batch = episode(device)
    learner = of(name, device).eval()
    support_x, query_x = (batch[i].clone().requires_grad_() for i in (0, 2))
    logits = learner.adapt_tasks(support_x, batch[1])(query_x)
    logits.square().sum().backward()
    assert support_x.grad.abs().sum() > 0 and query_x.grad.abs().sum() > 0
    assert all(p.grad.isfinite().all() for p in learner.parameters())


@EVERY
def test_logits_can_be_left_out(name, device):
    batch, learner = episode(device), of(name, device)
    loss, none = learner.meta_loss(*batch, return_logits=False)
    assert none is None
    twin = of(name, device)
    twin.load_state_dict(learner.state_dict())
    assert torch.equal(loss, twin.meta_loss(*batch)[0])


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_has_losses_in_float32(name, dtype, device):
    batch = episode(device, dtype=torch.float32)
    body = encoder(device, torch.float32)
    body[2] = nn.Linear(8, 6).to(device)
    learner = LEARNERS[name](body).to(device)
    expected = learner.meta_loss(*batch)[0]
    with torch.autocast(device, dtype):
        loss, logits = learner.meta_loss(*batch)
        adapted = learner.adapt_tasks(*batch[:2])(batch[2])
    loss.backward()
    assert loss.dtype == logits.dtype == adapted.dtype == torch.float32
    assert abs(loss.item() - expected.item()) < 0.05 * expected.item()
    assert all(p.grad.isfinite().all() for p in learner.parameters())


@EVERY
def test_state_dicts_round_trip(name, device):
    batch, learner = episode(device), of(name, device)
    learner.meta_loss(*batch)[0].backward()
    twin = of(name, device)
    twin.load_state_dict(copy.deepcopy(learner.state_dict()))
    assert torch.equal(twin.eval().meta_loss(*batch)[1], learner.eval().meta_loss(*batch)[1])
