"""MatchingNet against plain compositions and against ProtoNet; its context and its messages."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta as fm
from fastmeta.data import ClassTensors, Episodes
from tests.helpers.episodes import SHOTS, TASKS, WAYS, encoder, episode, exact

METRICS = ["sqeuclidean", "euclidean", "cosine", "dot"]


def context(steps: int = 3, dim: int = 5) -> fm.models.FullContext:
    torch.manual_seed(2)
    return fm.models.FullContext(dim, steps).double()


def plain_logits(encode: nn.Module, batch: tuple[Tensor, ...], metric: str, scale: float) -> Tensor:
    """Log-probabilities by their definition, for one task after the other."""
    found = []
    for support_x, support_y, query_x, _ in zip(*batch, strict=True):
        distance = fm.pairwise_distance(encode(query_x), encode(support_x), metric=metric)
        attention = (-scale * distance).softmax(1)
        found.append((attention @ F.one_hot(support_y, WAYS).to(attention)).log())
    return torch.stack(found)


@pytest.mark.parametrize("learn_scale", [False, True])
@pytest.mark.parametrize("metric", METRICS)
def test_meta_loss_is_the_plain_composition_s(metric, learn_scale, device):
    batch, encode = episode(device), encoder(device)
    twin = copy.deepcopy(encode)
    learner = fm.MatchingNet(encode, metric, 0.7, learn_scale).double().to(device)
    loss, logits = learner.meta_loss(*batch)
    expected = plain_logits(twin, batch, metric, learner.scale)
    exact(logits, expected.detach())
    assert not logits.requires_grad
    expected_loss = F.nll_loss(expected.flatten(0, 1), batch[3].flatten())
    exact(loss, expected_loss)
    loss.backward()
    expected_loss.backward()
    for ours, theirs in zip(encode.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)


def test_a_learned_scale_has_its_derivative(device):
    batch = episode(device)
    learner = fm.MatchingNet(encoder(device), learn_scale=True).double().to(device)
    learner.meta_loss(*batch)[0].backward()
    losses = []
    for step in (1e-5, -1e-5):
        shifted = copy.deepcopy(learner)
        with torch.no_grad():
            shifted.log_scale += step
        losses.append(shifted.meta_loss(*batch)[0].item())
    assert float(learner.log_scale.grad) == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-6)
    assert learner.scale == pytest.approx(10)


@pytest.mark.parametrize("metric", METRICS)
def test_one_shot_is_a_protonet(metric, device):
    batch = episode(device, shots=1)
    encode = encoder(device)
    ours = fm.MatchingNet(encode, metric, 3.0).meta_loss(*batch)
    proto = fm.ProtoNet(encode, metric, 3.0).meta_loss(*batch)
    exact(ours[0], proto[0])
    exact(ours[1], proto[1].log_softmax(2))


def test_one_shot_by_cosine_is_a_softmax_of_cosines(device):
    batch = episode(device, shots=1)
    encode = encoder(device)
    _, logits = fm.MatchingNet(encode, scale=10.0).meta_loss(*batch)
    query, support = (F.normalize(encode(x), dim=2) for x in (batch[2], batch[0]))
    exact(logits, (10 * query @ support.mT).log_softmax(2).detach())


def test_the_published_scale_has_a_floor():
    """All queries of 20 classes on their own support, and all others opposite."""
    support = torch.eye(2, dtype=torch.float64)[torch.tensor([0, *[1] * 19])]
    support = torch.where(torch.arange(20).unsqueeze(1) == 0, support, -torch.eye(2)[0].double())
    labels = torch.arange(20).unsqueeze(0)
    learner = fm.MatchingNet(nn.Identity(), scale=1.0)
    loss, _ = learner.meta_loss(support[None], labels, support[None, :1], labels[:, :1])
    assert float(loss) == pytest.approx(math.log(1 + 19 * math.exp(-2)), abs=1e-12)


@pytest.mark.parametrize("steps", [0, 3])
def test_zero_lstm_weights_make_the_context_the_plain_net(steps, device):
    batch, encode, module = episode(device), encoder(device), context(steps).to(device)
    for p in module.parameters():
        nn.init.zeros_(p)
    plain = fm.MatchingNet(encode).meta_loss(*batch)
    full = fm.MatchingNet(encode, context=module).meta_loss(*batch)
    assert torch.equal(full[0], plain[0]) and torch.equal(full[1], plain[1])


def test_without_reads_a_context_leaves_queries(device):
    query, keys = torch.randn(2, 3, 5).double(), torch.randn(2, 4, 5).double()
    assert torch.equal(context(0)(query, keys), query)


@pytest.mark.parametrize("options", [{}, {"context": True}, {"context": True, "orders": 3}])
def test_adapted_logits_are_those_of_meta_loss(options, device):
    batch = episode(device)
    if "context" in options:
        options = {**options, "context": context().to(device)}
    learner = fm.MatchingNet(encoder(device), **options).eval()
    loss, logits = learner.meta_loss(*batch)
    adapted = learner.adapt_tasks(*batch[:2])
    exact(adapted(batch[2]), logits)
    exact(adapted.task(1)(batch[2][1:]), logits[1:])
    assert len(adapted) == TASKS and adapted.labels is batch[1]
    exact(logits.exp().sum(2), torch.ones_like(logits[..., 0]))
    exact(loss, F.nll_loss(logits.flatten(0, 1), batch[3].flatten()))


def test_orders_are_averaged(device):
    batch, module = episode(device), context().to(device)
    learner = fm.MatchingNet(encoder(device), context=module, orders=3).eval()
    keys = learner.adapt_tasks(*batch[:2]).keys
    assert keys.shape == (TASKS, 3, WAYS * SHOTS, 5)
    assert not torch.allclose(keys[:, 0], keys[:, 1])
    each = []
    query = learner(batch[2].flatten(0, 1)).view(TASKS, -1, 5)
    for one in keys.unbind(1):
        each.append(fm.matching_logits(module(query, one), one, batch[1], WAYS))
    expected = torch.stack(each).mean(0).log_softmax(2)
    exact(learner.meta_loss(*batch)[1], expected.detach())
    learner.train()
    assert learner.adapt_tasks(*batch[:2]).keys.ndim == 3


def test_training_draws_the_order_from_torch_s_generator(device):
    batch = episode(device)
    learner = fm.MatchingNet(encoder(device), context=context().to(device))
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(learner.meta_loss(*batch)[0])
    assert torch.equal(losses[0], losses[1]) and not torch.equal(losses[0], losses[2])
    learner.eval()
    torch.manual_seed(0)
    before = learner.meta_loss(*batch)[0]
    assert torch.equal(before, learner.meta_loss(*batch)[0])


def test_the_context_depends_on_the_order_of_the_sequence_only(device):
    """A support in another order, through the same sequence, has the same keys."""
    module = context().to(device)
    support = torch.randn(1, 6, 5, dtype=torch.float64, device=device)
    shuffle = torch.tensor([3, 1, 5, 0, 2, 4], device=device)
    keys = module.keys(support, torch.arange(6, device=device).unsqueeze(0))
    inverse = shuffle.argsort().unsqueeze(0)
    exact(module.keys(support[:, shuffle], inverse), keys[:, shuffle])


def test_the_reads_are_those_of_the_paper(device):
    module, query = context(2).to(device), torch.randn(5, dtype=torch.float64, device=device)
    keys = torch.randn(4, 5, dtype=torch.float64, device=device)
    h, c = query, torch.zeros_like(query)
    for _ in range(2):
        read = (keys @ h).softmax(0) @ keys
        gates = F.linear(torch.cat([query, read]), module.query.weight_ih, module.query.bias_ih)
        gates = gates + F.linear(h, module.query.weight_hh, module.query.bias_hh)
        i, f, g, o = gates.chunk(4)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh() + query
    exact(module(query[None, None], keys[None])[0, 0], h)


def test_support_weights_count_examples(device):
    """An example of weight 2 is the same example twice; its query weights are as for a ProtoNet."""
    support_x, support_y, query_x, query_y = episode(device)
    twice = torch.cat([support_x, support_x[:, :1]], 1), torch.cat([support_y, support_y[:, :1]], 1)
    weight = torch.ones_like(support_y, dtype=torch.float64)
    weight[:, 0] = 2
    learner = fm.MatchingNet(encoder(device))
    expected = learner.meta_loss(*twice, query_x, query_y)
    found = learner.meta_loss(support_x, support_y, query_x, query_y, support_weight=weight)
    exact(found[0], expected[0])
    exact(found[1], expected[1])
    query_weight = torch.rand(query_y.shape, dtype=torch.float64, device=device)
    weighted = learner.meta_loss(support_x, support_y, query_x, query_y, query_weight=query_weight)
    _, logits = learner.meta_loss(support_x, support_y, query_x, query_y)
    losses = F.nll_loss(logits.mT, query_y, reduction="none")
    exact(weighted[0], ((query_weight * losses).sum(1) / query_weight.sum(1)).mean())


def test_a_weight_of_zero_has_its_derivative(device):
    batch = episode(device)
    weight = torch.ones_like(batch[1], dtype=torch.float64)
    weight[:, 1] = 0
    weight.requires_grad_()
    learner = fm.MatchingNet(encoder(device))

    def loss(w: Tensor) -> Tensor:
        return learner.meta_loss(*batch, support_weight=w)[0]

    grad = torch.autograd.grad(loss(weight), weight)[0][0, 1]
    ahead = weight.detach().clone()
    ahead[0, 1] = 1e-6
    assert float(grad) == pytest.approx((loss(ahead) - loss(weight)).item() / 1e-6, rel=1e-4)


def test_training_brings_the_loss_down(device):
    batch = episode(device)
    learner = fm.MatchingNet(encoder(device), context=context().to(device), learn_scale=True)
    learner.double().to(device)
    optimizer = torch.optim.Adam(learner.parameters(), lr=0.02)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss, _ = learner.meta_loss(*batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_explain_names_scale_context_and_backends(device):
    text = fm.MatchingNet(encoder(device), context=context().to(device)).explain()
    assert text.startswith(
        "MatchingNet, cosine distance, scale 10, context of 3 reads: one encoder"
    )
    assert "matching_loss " in text and "float64" in text


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"encoder": F.relu}, TypeError, "encoder: expected an nn.Module"),
        ({"metric": "manhattan"}, ValueError, r"metric: .*sqeuclidean.*'manhattan'"),
        ({"scale": "big"}, TypeError, "scale: expected a number"),
        ({"scale": 0.0}, ValueError, "scale: expected a finite number above 0, got 0.0"),
        ({"context": nn.LSTM(5, 5)}, TypeError, "context: expected a FullContext, got LSTM"),
        ({"orders": 0}, ValueError, "orders: expected an integer >= 1, got 0"),
        ({"orders": 2}, ValueError, "orders: expected 1 without a context, got 2"),
        ({"norm_statistics": "all"}, ValueError, "norm_statistics: .*batch, running, got 'all'"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        fm.MatchingNet(**{"encoder": nn.Identity(), **options})


def test_bad_calls(device):
    batch = episode(device)
    learner = fm.MatchingNet(encoder(device), context=context(dim=4).to(device))
    with pytest.raises(ValueError, match=r"context: expected dim 5, the width of .*, got 4"):
        learner.meta_loss(*batch)
    learner = fm.MatchingNet(encoder(device), context=context().to(device))
    weight = torch.ones_like(batch[1], dtype=torch.float64)
    with pytest.raises(ValueError, match="support_weight: expected None with a context"):
        learner.meta_loss(*batch, support_weight=weight)
    with pytest.raises(ValueError, match=r"steps: .* a MatchingNet takes no inner steps, got 3"):
        learner.adapt_tasks(*batch[:2], steps=3)
    with pytest.raises(ValueError, match=r"support_y\[0, 0\] is -2, expected 0 <= label < 3"):
        learner.adapt_tasks(batch[0], batch[1] - 2, num_classes=WAYS)
    with pytest.raises(ValueError, match=r"query_y\[0, 2\] is 2, a class without a support"):
        learner.meta_loss(batch[0], batch[1].clamp(max=1), batch[2], batch[3], num_classes=WAYS)


def test_a_trained_context_scores_support_in_any_order_alike(device):
    """Episodes list their classes one after the other: no order that a sequence may learn."""
    generator = torch.Generator().manual_seed(0)
    classes, examples = 40, 8
    x = 1.5 * torch.randn(classes, 1, 6, generator=generator)
    x = (x + torch.randn(classes, examples, 6, generator=generator)).flatten(0, 1)
    source = ClassTensors(x, torch.arange(classes).repeat_interleave(examples))
    episodes = Episodes(source, ways=4, shots=3, queries=4, tasks=16, seed=0, device=device)
    assert episodes[0].support_y[0].diff().ge(0).all()  # in the order of the classes
    torch.manual_seed(4)
    learner = fm.MatchingNet(nn.Linear(6, 6), context=fm.models.FullContext(6, 2)).to(device)
    optimizer = torch.optim.Adam(learner.parameters(), lr=0.01)
    for step in range(60):
        optimizer.zero_grad()
        learner.meta_loss(*episodes[step])[0].backward()
        optimizer.step()
    learner.eval()
    scores = []
    for index in range(1000, 1020):
        support_x, support_y, query_x, query_y = episodes[index]
        order = torch.randperm(support_y.shape[1], generator=generator).to(device)
        for support in ((support_x, support_y), (support_x[:, order], support_y[:, order])):
            _, logits = learner.meta_loss(*support, query_x, query_y)
            scores.append((logits.argmax(2) == query_y).float().mean(1))
    sorted_, shuffled = torch.stack(scores).unflatten(0, (-1, 2)).unbind(1)
    interval = 1.96 * (sorted_ - shuffled).std() / sorted_.numel() ** 0.5
    assert sorted_.mean() > 0.5
    assert (sorted_ - shuffled).mean().abs() < 1.5 * interval
