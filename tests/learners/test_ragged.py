"""Tasks of unequal size in one batch, padded with label -1: as the tasks one by one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastmeta as fm
from fastmeta.data import Episode
from tests.helpers.networks import build, joined, relative_error
from tests.helpers.ragged import (
    assert_no_gradient_at_absent,
    encoder,
    grads_of,
    one_by_one,
    ragged,
    with_garbage,
)

METRICS = ["sqeuclidean", "euclidean", "cosine", "dot"]
DTYPES = pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-6)], ids=str
)


@DTYPES
@pytest.mark.parametrize("metric", METRICS)
def test_protonet(metric, dtype, bound, device):
    learner, episode = fm.ProtoNet(encoder(device, dtype), metric, 0.7), ragged(device, dtype)
    losses, logits = zip(*(learner.meta_loss(*task) for task in one_by_one(episode)), strict=True)
    expected = torch.stack(losses).mean()
    expected.backward()
    grads = grads_of(learner)
    padded = with_garbage(episode)
    loss, found = learner.meta_loss(*padded)
    loss.backward()
    assert relative_error(loss, expected) < bound
    assert relative_error(grads_of(learner), grads) < bound
    assert_no_gradient_at_absent(padded)
    adapted = learner.adapt_tasks(*padded[:2])(padded.query_x, padded.query_y != -1)
    for t, task_logits in enumerate(logits):
        ways, here = task_logits.shape[2], episode.query_y[t] != -1
        for each in (found[t], adapted[t]):
            assert relative_error(each[here, :ways], task_logits[0]) < bound
            assert (each[:, ways:] == -torch.inf).all()


def test_protonet_of_equal_ways_takes_the_fused_loss(device):
    learner, episode = fm.ProtoNet(encoder(device)), ragged(device, ways=(3, 3))
    losses = [learner.meta_loss(*task)[0] for task in one_by_one(episode)]
    loss, logits = learner.meta_loss(*episode)
    assert relative_error(loss, torch.stack(losses).mean()) < 1e-12
    assert logits.isfinite().all()


def test_the_encoder_of_a_protonet_sees_the_present_examples_only(device):
    norm, twin = (nn.BatchNorm1d(5).double().to(device) for _ in range(2))
    episode, parts = with_garbage(ragged(device)), []
    batches = []
    norm.register_forward_hook(lambda module, inputs, output: batches.append(len(inputs[0])))
    loss, _ = fm.ProtoNet(norm).meta_loss(*episode)
    tasks = one_by_one(episode)
    everything = twin(torch.cat([torch.cat([t.support_x, t.query_x], 1)[0] for t in tasks]))
    for task in tasks:
        shots, queries = task.support_y.shape[1], task.query_y.shape[1]
        rows, everything = everything[: shots + queries], everything[shots + queries :]
        features = rows[None, :shots], task.support_y, rows[None, shots:], task.query_y
        parts.append(fm.ProtoNet(nn.Identity()).meta_loss(*features)[0])
    assert len(everything) == 0 and batches == [
        int((episode[1] >= 0).sum() + (episode[3] >= 0).sum())
    ]
    assert relative_error(loss, torch.stack(parts).mean()) < 1e-10
    torch.testing.assert_close(norm.running_mean, twin.running_mean, rtol=1e-12, atol=1e-14)


def test_protonet_relabels_the_present_examples(device):
    learner, episode = fm.ProtoNet(encoder(device)), ragged(device)
    names = torch.tensor([3, 7, 12, 42, -1], device=device)  # the last name stands for -1
    support_y, query_y = names[episode.support_y], names[episode.query_y]
    renamed = episode._replace(support_y=support_y, query_y=query_y)
    (loss, logits), expected = (
        learner.meta_loss(*renamed, relabel=True),
        learner.meta_loss(*episode),
    )
    torch.testing.assert_close(loss, expected[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(logits, expected[1], rtol=1e-12, atol=0)
    classes = learner.adapt_tasks(*renamed[:2], relabel=True).classes
    ways = (episode.support_y.amax(1) + 1).tolist()
    assert classes.tolist() == [[3, 7, 12, 42][:n] + [-1] * (max(ways) - n) for n in ways]


def test_protonet_tasks_without_examples(device):
    learner, episode = fm.ProtoNet(encoder(device)), ragged(device)
    tasks = [learner.meta_loss(*task)[0] for task in one_by_one(episode)]
    support_y, query_y = episode.support_y.clone(), episode.query_y.clone()
    query_y[:2] = -1
    support_y[1] = -1
    loss, logits = learner.meta_loss(*episode._replace(support_y=support_y, query_y=query_y))
    assert relative_error(loss, torch.stack(tasks[2:]).sum() / 5) < 1e-12
    assert (logits[1] == -torch.inf).all()
    nothing = episode._replace(
        support_y=torch.full_like(support_y, -1), query_y=torch.full_like(query_y, -1)
    )
    with pytest.raises(ValueError, match="num_classes: expected a number"):
        learner.meta_loss(*nothing)
    loss, _ = learner.meta_loss(*nothing, num_classes=4)
    loss.backward()
    assert loss == 0 and not grads_of(learner).any()
    with pytest.raises(ValueError, match=r"query_y\[2, 0\] is 0, a class without a support"):
        learner.meta_loss(*episode._replace(support_y=nothing.support_y.clone().index_copy(
            0, torch.tensor([0, 1], device=device), episode.support_y[:2]
        ), query_y=query_y))  # fmt: skip


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_a_compiled_protonet_refuses_absent_examples(backend):
    device = "cpu"  # on CUDA a failed check of a graph ends the context
    learner, episode = fm.ProtoNet(encoder(device)), ragged(device)
    step = torch.compile(
        lambda *batch: learner.meta_loss(*batch, num_classes=4)[0], fullgraph=True, backend=backend
    )
    whole = episode._replace(
        support_y=torch.arange(episode.support_y.shape[1]).remainder(4).repeat(5, 1),
        query_y=torch.arange(episode.query_y.shape[1]).remainder(4).repeat(5, 1),
    )
    expected = learner.meta_loss(*whole)[0]
    torch.testing.assert_close(step(*whole), expected, rtol=1e-12, atol=0)
    for broken in ({"support_y": episode.support_y}, {"query_y": episode.query_y}):
        with pytest.raises(RuntimeError, match="labels: expected no -1 in a compiled call"):
            step(*whole._replace(**broken))


def anil(device: str, dtype: torch.dtype, loss=F.cross_entropy, **options) -> fm.ANIL:
    torch.manual_seed(1)
    outputs = 4 if loss is F.cross_entropy else 1
    body = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh()).to(device, dtype)
    head = nn.Linear(8, outputs).to(device, dtype)
    return fm.ANIL(body, head, 0.4, 3, loss, learn_lr=True, **options)


def of_two_classes(episode: Episode) -> Episode:
    labels = [torch.where(y < 2, y, -1) for y in (episode.support_y, episode.query_y)]
    return episode._replace(support_y=labels[0], query_y=labels[1])


def binary(episode: Episode) -> Episode:
    """The labels as targets ``[T, B, 1]`` of the inputs' dtype."""
    dtype = episode.support_x.dtype
    targets = [y.unsqueeze(2).to(dtype) for y in (episode.support_y, episode.query_y)]
    return episode._replace(support_y=targets[0], query_y=targets[1])


OPTIONS = [{}, {"first_order": True}, {"form": "dual"}, {"task_chunk": 2}]


@DTYPES
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("loss", [F.cross_entropy, F.binary_cross_entropy_with_logits])
def test_anil(loss, options, dtype, bound, device):
    episode, learner = ragged(device, dtype), anil(device, dtype, loss, **options)
    if loss is not F.cross_entropy:
        episode = of_two_classes(episode)
    form = (lambda episode: episode) if loss is F.cross_entropy else binary
    tasks = one_by_one(episode)
    results = [learner.meta_gradient(*form(task)) for task in tasks]
    expected, grads, of_lr = (
        torch.stack([getattr(result, name) for result in results]).mean(0)
        for name in ("loss", "grads", "lr_grad")
    )
    padded = with_garbage(episode)
    value, outputs = learner.meta_loss(*form(padded))
    value.backward()
    assert relative_error(value, expected) < bound
    assert relative_error(joined(p.grad for p in learner.module.parameters()), grads) < bound
    assert relative_error(learner.lr.grad, of_lr) < bound
    for t, result in enumerate(results):
        assert relative_error(outputs[t, episode.query_y[t] != -1], result.outputs[0]) < bound
    if not options.get("first_order"):
        assert_no_gradient_at_absent(padded)
    found = learner.meta_gradient(*form(episode))
    assert relative_error(found.loss, expected) < bound
    assert relative_error(found.grads, grads) < bound
    adapted = learner.adapt_tasks(*form(padded)[:2])
    queries = adapted(padded.query_x, episode.query_y != -1)
    for t, task in enumerate(tasks):
        own = learner.adapt_tasks(*form(task)[:2])
        assert relative_error(adapted.params[t], own.params[0]) < bound
        here = queries[t, episode.query_y[t] != -1]
        assert relative_error(here, own(task.query_x)[0]) < bound


def test_anil_on_images(device):
    net, episode = build("conv4", device), ragged(device, shape=(1, 16, 16))
    learner = fm.ANIL(net[:-1], net[-1], 0.4, 2)
    results = [learner.meta_gradient(*task) for task in one_by_one(episode)]
    found = learner.meta_gradient(*episode)
    assert relative_error(found.loss, torch.stack([r.loss for r in results]).mean()) < 1e-10
    assert relative_error(found.grads, torch.stack([r.grads for r in results]).mean(0)) < 1e-9


def test_anil_takes_the_ignore_index_too(device):
    learner, episode = anil(device, torch.float64), ragged(device)
    ignored = [y.masked_fill(y == -1, -100) for y in episode[1::2]]
    renamed = episode._replace(support_y=ignored[0], query_y=ignored[1])
    loss, expected = (learner.meta_loss(*e)[0] for e in (renamed, episode))
    assert torch.equal(loss, expected) and (ignored[0] == -100).any()


def test_anil_tasks_without_examples(device):
    learner, episode = anil(device, torch.float64), ragged(device)
    tasks = [learner.meta_gradient(*task) for task in one_by_one(episode)]
    support_y, query_y = episode.support_y.clone(), episode.query_y.clone()
    query_y[:2] = -1
    support_y[1] = -1
    batch = episode._replace(support_y=support_y, query_y=query_y)
    found = learner.meta_gradient(*batch)
    assert relative_error(found.loss, torch.stack([r.loss for r in tasks[2:]]).sum() / 5) < 1e-10
    assert relative_error(found.grads, torch.stack([r.grads for r in tasks[2:]]).sum(0) / 5) < 1e-9
    start = torch.cat([p.flatten() for p in learner.head.parameters()])
    assert torch.equal(learner.adapt_tasks(*batch[:2]).params[1], start)
    nothing = torch.full_like(query_y, -1)
    found = learner.meta_gradient(*episode._replace(query_y=nothing))
    assert found.loss == 0 and not found.grads.any()


def test_a_compiled_anil_takes_absent_examples(device):
    learner, episode = anil(device, torch.float64), ragged(device)
    step = torch.compile(learner.meta_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(*episode)[0], learner.meta_loss(*episode)[0])


def test_queries_of_adapted_learners_need_a_fitting_mask(device):
    episode = ragged(device)
    for learner in (anil(device, torch.float64), fm.ProtoNet(encoder(device))):
        adapted = learner.adapt_tasks(*episode[:2])
        with pytest.raises(ValueError, match=r"present: expected shape \[5, "):
            adapted(episode.query_x, episode.support_y[:, :1] == 0)
        with pytest.raises(TypeError, match=r"present: expected dtype torch\.bool"):
            adapted(episode.query_x, episode.query_y)
