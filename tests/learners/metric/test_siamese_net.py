"""SiameseNet against enumerated pairs; its rankings, its edges and its messages."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta as fm
from tests.helpers.episodes import QUERIES, TASKS, WAYS, encoder, episode, exact

LOSSES = pytest.mark.parametrize("loss", ["bce", "contrastive"])
REDUCTIONS = pytest.mark.parametrize("reduce", ["max", "mean", "logsumexp"])


def learner(device: str, encode: nn.Module | None = None, dim: int = 5, **options) -> fm.SiameseNet:
    found = fm.SiameseNet(encode or encoder(device), dim, **options).double().to(device)
    torch.manual_seed(3)
    for p in (found.weight, found.bias):
        if p is not None:
            nn.init.normal_(p)
    return found


def similarity(net: fm.SiameseNet, a: Tensor, b: Tensor) -> Tensor:
    """Of one pair of embeddings, by its definition."""
    if net.loss == "contrastive":
        return -(a - b).norm()
    return (net.weight * (a - b).abs()).sum() + net.bias


def pair_loss(net: fm.SiameseNet, s: Tensor, same: bool) -> Tensor:
    if net.loss == "contrastive":
        return s.square() if same else (net.margin + s).clamp(min=0).square()
    return F.binary_cross_entropy_with_logits(s, torch.full_like(s, float(same)))


def enumerated(net: fm.SiameseNet, task: tuple[Tensor, ...], weights=None) -> Tensor:
    """Half the mean loss of the pairs of one class, plus half the mean loss of the others."""
    support_x, support_y, query_x, query_y = task
    support, query = net(support_x), net(query_x)
    w, v = weights or (torch.ones(len(support)), torch.ones(len(query)))
    pairs = [
        (support[i], support[j], bool(support_y[i] == support_y[j]), w[i] * w[j])
        for i, j in itertools.permutations(range(len(support)), 2)
    ]
    pairs += [
        (query[i], support[j], bool(query_y[i] == support_y[j]), v[i] * w[j])
        for i, j in itertools.product(range(len(query)), range(len(support)))
    ]
    halves = []
    for kind in (True, False):
        chosen = [
            (pair_loss(net, similarity(net, a, b), s), m) for a, b, s, m in pairs if s is kind
        ]
        halves.append(sum(loss * m for loss, m in chosen) / sum(m for _, m in chosen))
    return (halves[0] + halves[1]) / 2


@LOSSES
def test_the_loss_is_the_mean_over_enumerated_pairs(loss, device):
    net, batch = learner(device, loss=loss, margin=1.5), episode(device)
    found, _ = net.meta_loss(*batch)
    expected = torch.stack([enumerated(net, task) for task in zip(*batch, strict=True)]).mean()
    exact(found, expected)
    parameters = list(net.parameters())
    ours, theirs = (torch.autograd.grad(value, parameters) for value in (found, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@LOSSES
def test_weights_are_those_of_pairs(loss, device):
    net, batch = learner(device, loss=loss), episode(device)
    weights = [torch.rand(y.shape, dtype=torch.float64, device=device) for y in batch[1::2]]
    named = dict(zip(("support_weight", "query_weight"), weights, strict=True))
    tasks = zip(*batch, *weights, strict=True)
    expected = [enumerated(net, task, weight) for *task, w, v in tasks for weight in [(w, v)]]
    exact(net.meta_loss(*batch, **named)[0], torch.stack(expected).mean())


@REDUCTIONS
@LOSSES
def test_logits_are_reduced_similarities(loss, reduce, device):
    net, batch = learner(device, loss=loss, reduce=reduce), episode(device)
    _, logits = net.meta_loss(*batch)
    support, query = (net(x.flatten(0, 1)).view(TASKS, -1, 5) for x in (batch[0], batch[2]))
    reductions = {
        "max": lambda s: s.amax(),
        "mean": Tensor.mean,
        "logsumexp": lambda s: s.logsumexp(0),
    }
    for t, q, n in itertools.product(range(TASKS), range(WAYS * QUERIES), range(WAYS)):
        rows = support[t][batch[1][t] == n]
        each = torch.stack([similarity(net, query[t, q], row) for row in rows])
        exact(logits[t, q, n], reductions[reduce](each).detach())
    exact(net.adapt_tasks(*batch[:2])(batch[2]), logits)
    exact(net.adapt_tasks(*batch[:2]).task(1)(batch[2][1:]), logits[1:])


def test_equal_negative_weights_rank_as_the_nearest_neighbour_in_l1(device):
    net, batch = learner(device), episode(device)
    nn.init.constant_(net.weight, -1)
    nn.init.zeros_(net.bias)
    _, logits = net.meta_loss(*batch)
    support, query = (net(x.flatten(0, 1)).view(TASKS, -1, 5) for x in (batch[0], batch[2]))
    nearest = torch.cdist(query, support, p=1).argmin(2)
    assert torch.equal(logits.argmax(2), batch[1].gather(1, nearest))


def test_margin_zero_only_pulls(device):
    """Its least loss is the collapse."""
    net, batch = learner(device, loss="contrastive", margin=0.0), episode(device)
    loss, _ = net.meta_loss(*batch)
    assert loss > 0
    for p in net.encoder.parameters():
        nn.init.zeros_(p)
    collapsed, _ = net.meta_loss(*batch)
    assert collapsed == 0
    collapsed.backward()
    assert all((p.grad == 0).all() for p in net.parameters())


@LOSSES
def test_identical_examples_have_finite_gradients(loss, device):
    net = learner(device, nn.Identity(), 6, loss=loss)
    support_x, support_y, query_x, query_y = episode(device)
    query_x = support_x[:, :1].expand_as(query_x).clone().requires_grad_()
    value, _ = net.meta_loss(support_x, support_y, query_x, query_y)
    value.backward()
    assert query_x.grad.isfinite().all()
    if loss == "bce":
        # Of a pair of identical examples the probability is the sigmoid of the bias.
        scores = fm.pair_scores(support_x, support_x, net.weight, net.bias, "abs")
        itself = torch.diagonal(scores, dim1=1, dim2=2)
        exact(itself.sigmoid(), net.bias.sigmoid().expand_as(itself))
        assert torch.equal(net._similarity(support_x, support_x), scores)


def test_the_order_of_a_pair_changes_nothing(device):
    net = learner(device)
    a, b = torch.randn(2, 1, 4, 5, dtype=torch.float64, device=device)
    assert torch.equal(net._similarity(a, b), net._similarity(b, a).mT)


def test_equal_scores_for_all_classes_are_seen_as_such(device):
    """An accuracy of 1 from outputs that are all equal was a defect of others."""
    batch = episode(device)
    net = learner(device)
    for p in net.encoder.parameters():
        nn.init.zeros_(p)
    _, logits = net.meta_loss(*batch)
    assert (logits == logits[..., :1]).all()
    accuracy = (logits.argmax(2) == batch[3]).double().mean()
    assert float(accuracy) == pytest.approx(1 / WAYS)


def test_tasks_of_one_class_have_no_other_pairs(device):
    net, batch = learner(device), episode(device, ways=1)
    loss, logits = net.meta_loss(*batch)
    assert loss.isfinite() and logits.shape == (TASKS, QUERIES, 1)


def test_only_the_cross_entropy_has_a_head(device):
    assert {n for n, _ in learner(device).named_parameters()} > {"weight", "bias"}
    contrastive = dict(learner(device, loss="contrastive").named_parameters())
    assert all(name.startswith("encoder.") for name in contrastive)


@LOSSES
def test_training_brings_the_loss_down(loss, device):
    net, batch = learner(device, loss=loss), episode(device)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    losses = []
    for _ in range(300):
        optimizer.zero_grad()
        value, _ = net.meta_loss(*batch)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < losses[0] / 2


def test_explain(device):
    text = learner(device, loss="contrastive", margin=2.0).explain()
    assert text.startswith("SiameseNet, contrastive loss with margin 2 of all pairs, max of shots:")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"encoder": F.relu}, TypeError, "encoder: expected an nn.Module"),
        ({"dim": 0}, ValueError, "dim: expected an integer >= 1, got 0"),
        ({"loss": "hinge"}, ValueError, "loss: expected one of bce, contrastive, got 'hinge'"),
        ({"margin": -1.0}, ValueError, "margin: expected at least 0, got -1.0"),
        ({"reduce": "min"}, ValueError, "reduce: expected one of max, mean, logsumexp, got 'min'"),
        ({"pairs": "sampled"}, ValueError, "pairs: expected one of all, got 'sampled'"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        fm.SiameseNet(**{"encoder": nn.Identity(), "dim": 6, **options})


def test_bad_calls(device):
    batch = episode(device)
    with pytest.raises(ValueError, match="dim: expected the encoder's output width 5, got 4"):
        learner(device, dim=4).meta_loss(*batch)
    net = learner(device)
    with pytest.raises(ValueError, match=r"steps: .* a SiameseNet takes no inner steps, got 1"):
        net.adapt_tasks(*batch[:2], steps=1)
    with pytest.raises(ValueError, match=r"query_y\[0, 0\] is -2, expected 0 <= label < 3"):
        net.meta_loss(*batch[:3], batch[3] - 2)
