"""What each inductive head computes."""

from __future__ import annotations

import torch

import fastmeta as fm
from tests.helpers.features import N, draw


def test_nearest_centroid_is_a_protonet():
    support, labels, query = draw()
    proto = fm.ProtoNet(torch.nn.Identity(), "euclidean", 0.7).adapt_tasks(support, labels)
    torch.testing.assert_close(
        fm.heads.NearestCentroid("euclidean", 0.7)(support, labels, query), proto(query)
    )


def test_soft_kmeans_without_steps_is_the_nearest_centroid():
    torch.testing.assert_close(
        fm.heads.SoftKMeans(steps=0)(*draw()), fm.heads.NearestCentroid()(*draw())
    )


def test_a_step_of_soft_kmeans():
    support, labels, query = (x[0] for x in draw())
    shares = fm.heads.SoftKMeans(steps=0, scale=0.3)(support, labels, query).softmax(-1)
    centres = [
        (support[labels == n].sum(0) + shares[:, n] @ query)
        / ((labels == n).sum() + shares[:, n].sum())
        for n in range(N)
    ]
    expected = -0.3 * (query.unsqueeze(1) - torch.stack(centres)).square().sum(-1)
    found = fm.heads.SoftKMeans(steps=1, scale=0.3)(support, labels, query)
    torch.testing.assert_close(found, expected)


def test_ridge_is_the_papers_formula():
    support, labels, query = (x[0] for x in draw())
    y = torch.nn.functional.one_hot(labels, N).double()
    gram = support @ support.T + 2.0 * torch.eye(len(support), dtype=torch.float64)
    weight = support.T @ torch.linalg.solve(gram, y)
    found = fm.heads.Ridge(l2=2.0, scale=3.0, normalize=False)(support, labels, query)
    torch.testing.assert_close(found, 3 * query @ weight)


def test_logistic_is_gradient_descent_from_zero():
    support, labels, query = (x[0] for x in draw())
    weight, bias = (torch.zeros(N, k, dtype=torch.float64) for k in (support.shape[1], 1))
    for _ in range(4):
        weight.requires_grad_(), bias.requires_grad_()
        loss = torch.nn.functional.cross_entropy(support @ weight.T + bias.T, labels)
        steps = torch.autograd.grad(loss, (weight, bias))
        with torch.no_grad():
            weight, bias = (
                z - 0.5 * (g + 0.1 * z) for z, g in zip((weight, bias), steps, strict=True)
            )
    head = fm.heads.Logistic(steps=4, lr=0.5, weight_decay=0.1, normalize=False)
    torch.testing.assert_close(head(support, labels, query), query @ weight.T + bias.T)
