"""ProtoNet by Mahalanobis distances, against the formulas of Simple CNAPS with inverses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastmeta as fm


def episode(device: str):
    """Two tasks of three classes; the second has one shot of class 1, and padding."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 15, 6, generator=generator, dtype=torch.float64)
    support_y = torch.tensor([[0, 0, 1, 1, 2, 2, 2], [0, 0, 0, 1, 2, 2, -1]])
    query_y = torch.tensor([[0, 1, 2, 0, 1, 2, 2, 1], [2, 1, 0, 0, 1, -1, -1, -1]])
    parts = x[:, :7], support_y, x[:, 7:], query_y
    return tuple(part.to(device) for part in parts)


@pytest.fixture
def encoder(device: str) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double().to(device)


def covariance(rows):
    return torch.cov(rows.mT) if len(rows) > 1 else torch.zeros(5, 5).to(rows)


def plain_logits(encoder, episode, ridge, most, scale):
    tasks = []
    for support_x, support_y, query_x, _ in zip(*episode, strict=True):
        support, query = encoder(support_x), encoder(query_x)
        task, columns = covariance(support[support_y >= 0]), []
        for n in range(3):
            own = support[support_y == n]
            share = min(len(own) / (len(own) + 1), most)
            mixed = share * covariance(own) + (1 - share) * task
            precision = (mixed + ridge * torch.eye(5).to(mixed)).inverse()
            z = query - own.mean(0)
            columns.append(-scale * (z @ precision * z).sum(1))
        tasks.append(torch.stack(columns, 1))
    return torch.stack(tasks)


@pytest.mark.parametrize("ridge, most", [(1.0, 1.0), (0.1, 0.1)], ids=["CNAPS", "FS-Mol"])
def test_loss_logits_and_gradients_equal_the_formulas(encoder, ridge, most, device):
    given = episode(device)
    present = given[3] >= 0
    learner = fm.ProtoNet(encoder, "mahalanobis", 0.7, ridge=ridge, max_share=most)
    loss, logits = learner.meta_loss(*given)
    expected = plain_logits(encoder, given, ridge, most, 0.7)
    torch.testing.assert_close(logits[present], expected[present].detach())
    losses = [
        F.cross_entropy(z[keep], y[keep])
        for z, y, keep in zip(expected, given[3], present, strict=True)
    ]
    expected_loss = torch.stack(losses).mean()
    torch.testing.assert_close(loss, expected_loss)
    weights = list(encoder.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(loss, weights), torch.autograd.grad(expected_loss, weights)
    )


def test_adapted_tasks_and_query_weights(encoder, device):
    given = episode(device)
    learner = fm.ProtoNet(encoder, "mahalanobis")
    loss, logits = learner.meta_loss(*given)
    present = given[3] >= 0
    adapted = learner.adapt_tasks(*given[:2])
    assert adapted.covariances.shape == (2, 3, 5, 5)
    torch.testing.assert_close(adapted(given[2])[present].detach(), logits[present])
    weighted, _ = learner.meta_loss(*given, query_weight=present.double())
    torch.testing.assert_close(weighted, loss)


def test_a_class_that_a_task_lacks(encoder, device):
    support_x, support_y, query_x, query_y = episode(device)
    support_y, query_y = support_y.clone(), query_y.clone()
    support_y[1, 3] = 0
    query_y[1, query_y[1] == 1] = 0
    learner = fm.ProtoNet(encoder, "mahalanobis")
    loss, logits = learner.meta_loss(support_x, support_y, query_x, query_y)
    assert loss.isfinite() and logits[1, :5, 1].isneginf().all()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in encoder.parameters())


def test_support_weights_are_refused(encoder, device):
    given = episode(device)
    weight = torch.ones(2, 7, dtype=torch.float64, device=device)
    with pytest.raises(ValueError, match="support_weight: expected None with metric mahalanobis"):
        fm.ProtoNet(encoder, "mahalanobis").meta_loss(*given, support_weight=weight)
