"""RelationNet against ProtoNet and plain compositions; norms, aggregates and messages."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta as fm
from tests.helpers.episodes import QUERIES, SHOTS, TASKS, WAYS, encoder, episode, exact

IMAGE = (1, 28, 28)


def relation_net(device: str, **options) -> fm.RelationNet:
    torch.manual_seed(1)
    return fm.RelationNet(fm.models.RelationEncoder(4), **options).double().to(device)


class MinusSquaredDistance(nn.Module):
    """Of vectors side by side; it has no ``pairs``."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=1)
        return -(a - b).square().sum(1)


class Plain(nn.Module):
    """A relation module without its ``pairs``."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x).unsqueeze(1)


def test_minus_the_squared_distance_is_a_protonet(device):
    batch, encode = episode(device), encoder(device)
    learner = fm.RelationNet(encode, MinusSquaredDistance(), "cross_entropy", "mean")
    found, expected = learner.meta_loss(*batch), fm.ProtoNet(encode).meta_loss(*batch)
    exact(found[0], expected[0])
    exact(found[1], expected[1])
    ours, theirs = (torch.autograd.grad(x[0], list(encode.parameters())) for x in (found, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_pairs_are_the_concatenations(loss, training, device):
    """Loss, logits, gradients and running statistics."""
    batch, ours = episode(device, IMAGE), relation_net(device, loss=loss)
    theirs = copy.deepcopy(ours)
    theirs.relation = Plain(theirs.relation)
    for learner in (ours, theirs):
        learner.train(training)
        value, learner.found = learner.meta_loss(*batch)
        value.backward()
        learner.value = value.detach()
    exact(ours.value, theirs.value)
    exact(ours.found, theirs.found)
    gradients = [dict(learner.named_parameters()) for learner in (ours, theirs)]
    for name, p in gradients[0].items():
        other = gradients[1][name.replace("relation.", "relation.module.")]
        torch.testing.assert_close(p.grad, other.grad, rtol=1e-8, atol=1e-11)
    norms = [dict(learner.named_buffers()) for learner in (ours, theirs)]
    for name, b in norms[0].items():
        torch.testing.assert_close(
            b, norms[1][name.replace("relation.", "relation.module.")], rtol=1e-12, atol=1e-12
        )


def test_the_loss_is_the_squared_error_to_one_hot_labels(device):
    batch, learner = episode(device, IMAGE), relation_net(device).eval()
    loss, logits = learner.meta_loss(*batch)
    exact(loss, F.mse_loss(logits.sigmoid(), F.one_hot(batch[3], WAYS).double()))
    learner.loss = "cross_entropy"
    loss, same = learner.meta_loss(*batch)
    assert torch.equal(same, logits)
    exact(loss, F.cross_entropy(logits.flatten(0, 1), batch[3].flatten()))


def test_a_sum_of_shots_is_their_number_times_the_mean(device):
    batch = episode(device, IMAGE)
    total, mean = (
        relation_net(device, aggregate=name).eval().adapt_tasks(*batch[:2]).maps
        for name in ("sum", "mean")
    )
    assert total.shape == (TASKS, WAYS, 4, 5, 5)
    exact(total, SHOTS * mean)


def test_weights_count_in_sum_and_mean(device):
    support_x, support_y, *_ = episode(device, IMAGE)
    weight = torch.rand(support_y.shape, dtype=torch.float64, device=device)
    for name in ("sum", "mean"):
        learner = relation_net(device, aggregate=name).eval()
        maps = learner(support_x.flatten(0, 1)).unflatten(0, support_y.shape)
        found = learner.adapt_tasks(support_x, support_y, support_weight=weight).maps
        for t in range(TASKS):
            for n in range(WAYS):
                w = weight[t][support_y[t] == n]
                expected = (w.view(-1, 1, 1, 1) * maps[t][support_y[t] == n]).sum(0)
                exact(found[t, n], expected / (w.sum() if name == "mean" else 1))


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_query_weights(loss, device):
    batch, learner = episode(device, IMAGE), relation_net(device, loss=loss).eval()
    weight = torch.rand(batch[3].shape, dtype=torch.float64, device=device)
    _, logits = learner.meta_loss(*batch)
    if loss == "mse":
        losses = (logits.sigmoid() - F.one_hot(batch[3], WAYS)).square().mean(2)
    else:
        losses = F.cross_entropy(logits.mT, batch[3], reduction="none")
    expected = ((weight * losses).sum(1) / weight.sum(1)).mean()
    exact(learner.meta_loss(*batch, query_weight=weight)[0], expected)


@pytest.mark.parametrize("norm_statistics", ["running", "batch"])
def test_adapted_logits_are_those_of_meta_loss(norm_statistics, device):
    batch = episode(device, IMAGE)
    learner = relation_net(device, norm_statistics=norm_statistics).eval()
    adapted = learner.adapt_tasks(*batch[:2])
    logits = adapted(batch[2])
    if norm_statistics == "running":
        exact(logits, learner.meta_loss(*batch)[1])
        exact(adapted.task(1)(batch[2][1:]), logits[1:])
    else:
        # Support and queries are two calls of the encoder, each by its own statistics.
        assert not torch.allclose(logits, learner.meta_loss(*batch)[1])


def test_batch_statistics_in_evaluation_are_those_of_training(device):
    batch = episode(device, IMAGE)
    learner = relation_net(device, norm_statistics="batch")
    before = copy.deepcopy(learner)
    expected = learner.meta_loss(*batch)
    learner.load_state_dict(before.state_dict())
    found = learner.eval().meta_loss(*batch)
    exact(found[0], expected[0])
    exact(found[1], expected[1])
    for (name, ours), theirs in zip(learner.named_buffers(), before.buffers(), strict=True):
        assert torch.equal(ours, theirs), name
    assert (
        "Transductive" in learner.explain() and "Transductive" not in relation_net(device).explain()
    )
    assert learner.is_transductive


def test_one_class(device):
    batch, learner = episode(device, IMAGE, ways=1), relation_net(device)
    loss, logits = learner.meta_loss(*batch)
    loss.backward()
    assert logits.shape == (TASKS, QUERIES, 1) and loss.isfinite()


def test_vectors_by_a_relation_mlp(device):
    batch, encode = episode(device), encoder(device)
    torch.manual_seed(2)
    module = fm.models.RelationMLP(5, 7).double().to(device)
    found = fm.RelationNet(encode, module).meta_loss(*batch)
    expected = fm.RelationNet(encode, Plain(module)).meta_loss(*batch)
    exact(found[0], expected[0])
    exact(found[1], expected[1])


def test_chunks_of_pairs_change_nothing(device, monkeypatch):
    batch = episode(device)
    module = nn.Sequential(nn.Linear(10, 4), nn.Tanh(), nn.Linear(4, 1)).double().to(device)
    learner = fm.RelationNet(encoder(device), module)
    sizes = []
    module.register_forward_hook(lambda m, inputs, output: sizes.append(len(inputs[0])))
    with torch.no_grad():
        expected = learner.meta_loss(*batch)[1]
        monkeypatch.setattr("fastmeta.models.relation._CHUNK", 100)
        exact(learner.meta_loss(*batch)[1], expected)
    pairs = TASKS * WAYS * QUERIES * WAYS
    assert sizes == [pairs, *[10] * (pairs // 10), *([pairs % 10] if pairs % 10 else [])]


def test_training_brings_the_loss_down(device):
    batch, learner = episode(device), fm.RelationNet(encoder(device), fm.models.RelationMLP(5, 16))
    learner.double().to(device)
    optimizer = torch.optim.Adam(learner.parameters(), lr=0.02)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss, _ = learner.meta_loss(*batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_explain(device):
    text = relation_net(device).explain()
    assert text.startswith("RelationNet, mse loss, sum of shots, RelationModule on pairs: one enc")
    text = fm.RelationNet(encoder(device), MinusSquaredDistance()).explain()
    assert "MinusSquaredDistance on concatenations" in text


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"encoder": F.relu}, TypeError, "encoder: expected an nn.Module"),
        ({"relation": None}, ValueError, "relation: expected a module, as the encoder is a Ident"),
        ({"relation": F.relu}, TypeError, "relation: expected an nn.Module, got function"),
        ({"loss": "bce"}, ValueError, "loss: expected one of mse, cross_entropy, got 'bce'"),
        ({"aggregate": "max"}, ValueError, "aggregate: expected one of sum, mean, got 'max'"),
        ({"norm_statistics": "all"}, ValueError, "norm_statistics: expected one of batch, running"),
    ],
)
def test_bad_options(options, error, message):
    given = {"encoder": nn.Identity(), "relation": MinusSquaredDistance(), **options}
    with pytest.raises(error, match=message):
        fm.RelationNet(**given)


def test_bad_calls(device):
    module = fm.models.RelationModule(4)
    with pytest.raises(
        ValueError, match=r"encoder: expected maps \[B, C, H, W\] of \[4, 5, 5\] .*"
    ):
        fm.RelationNet(encoder(device), module).meta_loss(*episode(device))
    with pytest.raises(ValueError, match=r"of \[4, 5, 5\] for the relation module, got \[36, 4, 6"):
        relation_net(device).meta_loss(*episode(device, (1, 32, 32)))
    with pytest.raises(
        ValueError, match=r"relation: expected one score a pair, \[72\], got \[72, 2"
    ):
        fm.RelationNet(encoder(device), nn.Linear(10, 2).double()).meta_loss(*episode(device))
    batch, learner = episode(device, IMAGE), relation_net(device)
    with pytest.raises(ValueError, match=r"steps: .* a RelationNet takes no inner steps, got 0"):
        learner.adapt_tasks(*batch[:2], steps=0)
    for loss in ("mse", "cross_entropy"):
        learner.loss = loss
        with pytest.raises(ValueError, match=r"query_y\[0, 0\] is -2, expected 0 <= label < 3"):
            learner.meta_loss(*batch[:3], batch[3] - 2)
