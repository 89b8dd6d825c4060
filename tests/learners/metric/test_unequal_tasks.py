"""Learners that compare embeddings on padded batches: as the tasks one by one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastmeta as fm
from tests.helpers.networks import relative_error
from tests.helpers.ragged import (
    assert_no_gradient_at_absent,
    encoder,
    grads_of,
    one_by_one,
    ragged,
    with_garbage,
)

DTYPES = pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-6)], ids=str
)


def context(**options) -> dict[str, object]:
    torch.manual_seed(2)
    return {"context": fm.models.FullContext(6, 2), **options}


def relation(encode: nn.Module, **options) -> fm.RelationNet:
    torch.manual_seed(2)
    return fm.RelationNet(encode, fm.models.RelationMLP(6, 7), **options)


class Difference(nn.Module):
    """A relation module without ``pairs``, and with a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.norm, self.out = nn.BatchNorm1d(12), nn.Linear(12, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(x).tanh())


LEARNERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "matching": lambda net: fm.MatchingNet(net),
    "matching sqeuclidean": lambda net: fm.MatchingNet(net, "sqeuclidean", 0.7),
    "matching learned": lambda net: fm.MatchingNet(net, learn_scale=True),
    "matching context": lambda net: fm.MatchingNet(net, **context()),
    "matching orders": lambda net: fm.MatchingNet(net, **context(orders=2)),
    "siamese": lambda net: fm.SiameseNet(net, 6),
    "siamese mean": lambda net: fm.SiameseNet(net, 6, reduce="mean"),
    "siamese contrastive": lambda net: fm.SiameseNet(net, 6, "contrastive", reduce="logsumexp"),
    "relation": relation,
    "relation cross entropy": lambda net: relation(net, loss="cross_entropy", aggregate="mean"),
    "relation of concatenations": lambda net: fm.RelationNet(net, Difference()),
}


def of(name: str, device: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    return LEARNERS[name](encoder(device, dtype)).to(device, dtype).eval()


@DTYPES
@pytest.mark.parametrize("name", LEARNERS)
def test_a_padded_batch_is_its_tasks_one_by_one(name, dtype, bound, device):
    learner, episode = of(name, device, dtype), ragged(device, dtype)
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


@pytest.mark.parametrize("name", LEARNERS)
def test_names_of_classes_are_numbered(name, device):
    learner, episode = of(name, device), ragged(device)
    names = torch.tensor([3, 7, 12, 42, -1], device=device)  # the last name stands for -1
    support_y, query_y = names[episode.support_y], names[episode.query_y]
    renamed = episode._replace(support_y=support_y, query_y=query_y)
    found, expected = learner.meta_loss(*renamed, relabel=True), learner.meta_loss(*episode)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-12, atol=1e-12)
    classes = learner.adapt_tasks(*renamed[:2], relabel=True).classes
    assert classes.amax(1).tolist() == names[episode.support_y.amax(1)].tolist()


@pytest.mark.parametrize("name", [name for name in LEARNERS if "context" not in name])
def test_weights_of_zero_are_absence(name, device):
    learner, episode = of(name, device), ragged(device)
    if "orders" in name:
        pytest.skip("a context takes no weights")
    weights = {
        f"{kind}_weight": (y != -1).double()
        for kind, y in (("support", episode.support_y), ("query", episode.query_y))
    }
    present = episode._replace(
        support_y=episode.support_y.clamp(min=0), query_y=episode.query_y.clamp(min=0)
    )
    found, expected = learner.meta_loss(*present, **weights), learner.meta_loss(*episode)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-12, atol=1e-12)
    here = (episode.query_y != -1).unsqueeze(2)
    for logits in (found[1], expected[1]):
        logits.masked_fill_(~here, 0)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LEARNERS)
def test_tasks_without_examples_count_as_zero(name, device):
    learner, episode = of(name, device), ragged(device)
    tasks = [learner.meta_loss(*task)[0] for task in one_by_one(episode)]
    support_y, query_y = episode.support_y.clone(), episode.query_y.clone()
    support_y[1], query_y[1], query_y[3] = -1, -1, -1
    if isinstance(learner, fm.SiameseNet):
        tasks[3] = learner.meta_loss(*(x[3:4] for x in (*episode[:3], query_y)))[0]
    else:
        tasks[3] = torch.zeros_like(tasks[3])
    tasks[1] = torch.zeros_like(tasks[1])
    padded = with_garbage(episode._replace(support_y=support_y, query_y=query_y))
    loss, logits = learner.meta_loss(*padded)
    loss.backward()
    assert relative_error(loss, torch.stack(tasks).mean()) < 1e-10
    assert (logits[1] == -torch.inf).all() and not logits.isnan().any()
    assert_no_gradient_at_absent(padded)


def test_nothing_present_has_no_loss(device):
    episode = ragged(device)
    absent = episode._replace(
        support_y=torch.full_like(episode.support_y, -1),
        query_y=torch.full_like(episode.query_y, -1),
    )
    torch.manual_seed(2)
    maps = fm.RelationNet(nn.Linear(5, 6).to(device), fm.models.RelationModule(4)).double().eval()
    for learner in (*(of(name, device) for name in LEARNERS if "relation" not in name), maps):
        loss, logits = learner.meta_loss(*absent, num_classes=3)
        loss.backward()
        assert loss == 0 and (logits == -torch.inf).all()
    with pytest.raises(ValueError, match="support_y and query_y: expected a present example"):
        of("relation", device).meta_loss(*absent, num_classes=3)


def image_learner(device: str) -> fm.RelationNet:
    torch.manual_seed(1)
    return fm.RelationNet(fm.models.RelationEncoder(3)).double().to(device)


def test_no_norm_sees_the_padding(device):
    """In training too, where the norms of encoder and relation module take batch statistics."""
    episode = with_garbage(ragged(device, shape=(1, 28, 28)))
    learner = image_learner(device)
    loss, logits = learner.meta_loss(*episode)
    twin = image_learner(device)
    tasks = one_by_one(episode)
    rows = twin.encoder(torch.cat([torch.cat([t.support_x, t.query_x], 1)[0] for t in tasks]))
    pairs, losses, place = [], [], 0
    for task in tasks:
        shots, queries = task.support_y.shape[1], task.query_y.shape[1]
        support, query = rows[place : place + shots + queries].split([shots, queries])
        place += shots + queries
        ways = int(task.support_y.max()) + 1
        maps = torch.stack([support[task.support_y[0] == n].sum(0) for n in range(ways)])
        both = maps.expand(queries, *maps.shape), query.unsqueeze(1).expand(queries, *maps.shape)
        pairs.append(torch.cat(both, dim=2).flatten(0, 1))
    scores = twin.relation(torch.cat(pairs)).split([len(part) for part in pairs])
    for t, (task, each) in enumerate(zip(tasks, scores, strict=True)):
        queries = task.query_y.shape[1]
        own = each.view(queries, -1)
        target = nn.functional.one_hot(task.query_y[0], own.shape[1])
        losses.append((own.sigmoid() - target).square().mean())
        here = logits[t][episode.query_y[t] != -1][:, : own.shape[1]]
        torch.testing.assert_close(here, own.detach(), rtol=1e-9, atol=1e-10)
    assert relative_error(loss, torch.stack(losses).mean()) < 1e-10
    for ours, theirs in zip(learner.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
