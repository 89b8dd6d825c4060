"""What each transductive head computes, against its formulas."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastmeta as fm
from fastmeta.heads._transport import transported
from fastmeta.heads.base import unit
from fastmeta.heads.laplacian_shot import neighbours
from tests.helpers.features import SHOTS, D, N, Q, T, draw

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def one_task() -> tuple[Tensor, Tensor, Tensor]:
    return tuple(x[0] for x in draw())


# BD-CSPN


@pytest.mark.parametrize("moved", [True, False])
def test_bd_cspn_is_its_formula_with_one_hot_pseudo_labels(moved):
    support, labels, query = one_task()
    shifted = query + support.mean(0) - query.mean(0)
    means = torch.stack([support[labels == n].mean(0) for n in range(N)])
    rows = torch.cat([support, shifted])
    similarity = F.normalize(rows, dim=1) @ F.normalize(means, dim=1).T
    pseudo = F.one_hot(similarity[len(support) :].argmax(1), N)
    weight = torch.cat([F.one_hot(labels, N), pseudo]) * (4 * similarity).exp()
    rectified = (weight / weight.sum(0)).T @ rows
    expected = 4 * F.normalize(shifted if moved else query, dim=1) @ F.normalize(rectified, dim=1).T
    head = fm.heads.BDCSPN(4.0, shift_queries=moved, normalize=False)
    torch.testing.assert_close(head(support, labels, query), expected, **EXACT)


def test_bd_cspn_takes_the_most_similar_queries():
    """With one query a class, the others do not move it: far ones change nothing but the shift."""
    support, labels, query = one_task()
    every, best = (fm.heads.BDCSPN(4.0, top=top)(support, labels, query) for top in (Q, 1))
    torch.testing.assert_close(every, fm.heads.BDCSPN(4.0)(support, labels, query), **EXACT)
    assert not torch.allclose(every, best)


# LaplacianShot


def test_laplacian_shot_without_steps_is_the_nearest_centroid():
    plain = fm.heads.LaplacianShot(steps=0, rectify=False)
    torch.testing.assert_close(plain(*draw()), fm.heads.SimpleShot()(*draw()), **EXACT)


def test_the_graph_has_the_nearest_queries():
    query = draw()[2]
    far = torch.cdist(query, query).masked_fill(torch.eye(Q, dtype=torch.bool), torch.inf)
    expected = torch.zeros_like(far).scatter(2, far.topk(2, largest=False).indices, 1)
    assert torch.equal(neighbours(query, 2, None), expected)
    assert neighbours(query[:, :2], 5, None).sum() == 2 * T  # no more neighbours than there are
    present = torch.arange(Q).expand(T, -1) < 5
    assert neighbours(query, 9, present)[:, :, 5:].sum() == 0


def test_bound_updates_lower_the_energy():
    support, labels, query = one_task()
    graph = neighbours(unit(query)[None], 2, None)[0]

    def energy(steps: int) -> float:
        head = fm.heads.LaplacianShot(steps, 0.7, rectify=False)
        y = head(support, labels, query).softmax(-1)
        means = torch.stack([unit(support)[labels == n].mean(0) for n in range(N)])
        unary = torch.cdist(unit(query), means).square()
        symmetric = (graph + graph.T) / 2
        return float((y * y.log() + unary * y - 0.35 * y * (symmetric @ y)).sum())

    assert energy(0) > energy(30)


# PT-MAP


def balanced(scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    scores = scale * torch.randn(T, N, Q, generator=generator, dtype=torch.float64)
    sizes = torch.full((T, N, 1), Q / N, dtype=torch.float64)
    return transported(scores, sizes, torch.zeros_like(sizes))[1].exp()


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 300.0])
def test_sums_of_the_plan(scale):
    plan = balanced(scale)
    torch.testing.assert_close(plan.sum(1), torch.ones(T, Q, dtype=torch.float64), **EXACT)
    torch.testing.assert_close(plan.sum(2), torch.full((T, N), Q / N, dtype=torch.float64), **EXACT)


def test_the_plan_is_where_sinkhorn_ends():
    generator = torch.Generator().manual_seed(3)
    plan = (2 * torch.randn(T, N, Q, generator=generator, dtype=torch.float64)).exp()
    for _ in range(3000):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan * (Q / N) / plan.sum(2, keepdim=True)
    torch.testing.assert_close(balanced(2.0), plan, **EXACT)


def test_second_derivatives_of_the_plan():
    generator = torch.Generator().manual_seed(4)
    scores = torch.randn(1, 2, 4, generator=generator, dtype=torch.float64).requires_grad_()
    sizes = torch.full((1, 2, 1), 2.0, dtype=torch.float64)

    def plan(scores: Tensor) -> Tensor:
        return transported(scores, sizes, torch.zeros_like(sizes))[1].exp()

    assert torch.autograd.gradcheck(plan, scores)
    assert torch.autograd.gradgradcheck(plan, scores, atol=1e-4)


def test_pt_map_is_its_formula():
    support, labels, query = one_task()
    rows = torch.cat([support, query]).relu().add(1e-6).sqrt()
    rows = rows / rows.norm(dim=1, keepdim=True)
    one_hot = F.one_hot(labels, N).double()
    centres = one_hot.T @ rows[: len(support)] / SHOTS
    for step in range(4):
        scores = -10 * torch.cdist(rows[len(support) :], centres).square().T
        sizes = torch.full((1, N, 1), Q / N, dtype=torch.float64)
        log = transported(scores[None], sizes, torch.zeros_like(sizes))[1][0]
        if step < 3:
            z = torch.cat([one_hot, log.exp().T])
            centres = centres + 0.2 * ((z.T @ rows) / z.sum(0).unsqueeze(1) - centres)
    torch.testing.assert_close(fm.heads.PTMAP(3)(support, labels, query), log.T, **EXACT)


# TIM and transductive fine-tuning


def score(metric: str, rows: Tensor, centres: Tensor) -> Tensor:
    if metric == "cosine":
        return F.normalize(rows, dim=1) @ F.normalize(centres, dim=1).T
    squared = (rows.unsqueeze(1) - centres).square().sum(-1)
    return -squared / 2 if metric == "sqeuclidean" else -squared.sqrt()


def mutual_information_loss(metric: str, centres: Tensor, task: tuple, weights: tuple) -> Tensor:
    support, labels, query = task
    p = (5 * score(metric, query, centres)).softmax(1)
    cross = F.cross_entropy(5 * score(metric, support, centres), labels)
    marginal, conditional = p.mean(0), -(p * p.log()).sum(1).mean()
    entropy = -(marginal * marginal.log()).sum()
    return weights[0] * cross - weights[1] * entropy + weights[2] * conditional


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean", "cosine"])
def test_steps_equal_autograd_on_the_centres(metric, optimizer):
    """The dual form of "sgd" equals steps on the centres in float64."""
    support, labels, query = one_task()
    support, query = (F.normalize(x, dim=1) for x in (support, query))
    weights = (0.3, 0.8, 0.2)
    centres = torch.stack([support[labels == n].mean(0) for n in range(N)]).requires_grad_()
    kind = torch.optim.SGD if optimizer == "sgd" else torch.optim.Adam
    steps = kind([centres], lr=0.02)
    for _ in range(12):
        steps.zero_grad()
        mutual_information_loss(metric, centres, (support, labels, query), weights).backward()
        steps.step()
    head = fm.heads.TIM(12, 0.02, 5.0, *weights, metric, optimizer)
    expected = 5 * score(metric, query, centres.detach())
    torch.testing.assert_close(head(support, labels, query), expected, rtol=1e-8, atol=1e-8)


def test_transductive_finetuning_is_tim_without_the_marginal():
    given = draw()
    head = fm.heads.TransductiveFinetuning(6, 0.05, 2.0, "euclidean")
    tim = fm.heads.TIM(6, 0.05, 2.0, 1.0, 0.0, 1.0, "euclidean")
    torch.testing.assert_close(head(*given), tim(*given), **EXACT)


def test_far_features_keep_their_digits():
    """Features far from the origin, in float32."""
    support, labels, query = draw()
    head = fm.heads.TIM(5, 0.01, 1.0, normalize=False)
    near = head(support, labels, query)
    far = head((support + 1000).float(), labels, (query + 1000).float())
    torch.testing.assert_close(far.double(), near, rtol=1e-3, atol=1e-2)


def test_the_defaults_of_tim_improve_its_loss():
    support, labels, query = one_task()
    support, query = (F.normalize(x, dim=1) for x in (support, query))

    def loss(steps: int) -> float:
        p = fm.heads.TIM(steps)(support, labels, query).softmax(1)
        marginal = p.mean(0)
        return float((marginal * marginal.log()).sum() - 0.1 * (p * p.log()).sum(1).mean())

    assert loss(50) < loss(0) and math.isfinite(loss(50))


# FEAT


def test_feat_is_attention_between_the_classes():
    support, labels, query = one_task()
    head = fm.heads.FEAT(D, dropout=0.0).double()
    means = torch.stack([support[labels == n].mean(0) for n in range(N)])
    q, k, v = (layer(means) for layer in (head.w_qs, head.w_ks, head.w_vs))
    mixed = (q @ k.T / D**0.5).softmax(1) @ v
    centres = F.layer_norm(means + head.fc(mixed), (D,))
    expected = -torch.cdist(query, centres).square() / 64
    torch.testing.assert_close(head(support, labels, query), expected, **EXACT)


def test_feat_learns():
    head = fm.heads.FEAT(D, dropout=0.0).double()
    support, labels, query = draw()
    loss = F.cross_entropy(
        head(support, labels, query).flatten(0, 1), torch.arange(Q).repeat(T) % N
    )
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())
