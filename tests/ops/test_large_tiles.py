"""Distances in arrays that are large enough for products to make them: no digit may be lost.

Large arrays of distances are summed as |x|^2 + |y|^2 - 2 x.y, and again as differences where that
is inexact (csrc/pairwise_distance/large_tile.cuh and tile_cpu.h). Every device must pass the same;
plain PyTorch sums them in float64.
"""

from __future__ import annotations

import pytest
import torch

import fastmeta as fm
from tests.helpers.case import CaseFactory
from tests.helpers.skips import EMULATED

# More tiles than a GPU has multiprocessors; the emulator's has two. A CPU wants many queries.
TASKS, QUERIES = (1, 70) if EMULATED else (60, 70) if torch.cuda.is_available() else (2, 520)
CLASSES = 130


def rows(device: str, features: int) -> tuple[torch.Tensor, torch.Tensor]:
    make = CaseFactory(torch.float32, device)
    return make.randn(TASKS, QUERIES, features), make.randn(TASKS, CLASSES, features)


def far_and_near(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Clusters 1e4 apart, rows within a cluster 1e-1."""
    center = 1e4 * torch.arange(3.0, device=x.device).view(1, 3, 1)
    x, y = 0.1 * x, 0.1 * y
    for z in (x, y):
        z += center[:, torch.arange(z.shape[1]) % 3]
    return x, y


def near_duplicates(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Some queries 1e-3 from a prototype, some on it."""
    y[:, :60:3] = x[:, :60:3] + 1e-3 * y[:, :60:3]
    y[:, 1:60:3] = x[:, 1:60:3]
    return x, y


INPUTS = {
    "random": lambda x, y: (x, y),
    "near duplicates": near_duplicates,
    "all near each other": lambda x, y: (1e3 + 1e-3 * x, 1e3 + 1e-3 * y),
    "all the same": lambda x, y: (torch.full_like(x, 3.7), torch.full_like(y, 3.7)),
    "far and near": far_and_near,
    "of all sizes": lambda x, y: (x * 10.0 ** (3 * x[..., :1]), y * 10.0 ** (3 * y[..., :1])),
}


@pytest.mark.parametrize("features", [7, 8, 67])
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean"])
def test_distances_keep_their_digits(metric, inputs, features, device):
    x, y = INPUTS[inputs](*rows(device, features))
    slack = 0.0 if fm.core.backend.is_available("pairwise_distance", x) else of_an_expansion(x, y)
    distance = fm.pairwise_distance(x, y, metric).double().cpu()
    with fm.use_backend("torch"):
        x, y = x.double().cpu(), y.double().cpu()
        squared = torch.stack([(x[:, q, None] - y).square().sum(2) for q in range(QUERIES)], 1)
    exact, slack = (squared, slack) if metric == "sqeuclidean" else (squared.sqrt(), slack**0.5)
    assert (distance - exact).abs().le(5e-6 * exact + slack).all()


def of_an_expansion(x: torch.Tensor, y: torch.Tensor) -> float:
    """Rounding of squared distances made of products in float64, as plain PyTorch makes them."""
    largest = max(x.abs().max().item(), y.abs().max().item())
    return 4 * torch.finfo(torch.float64).eps * x.shape[2] * largest**2


@pytest.mark.parametrize("inputs", ["near duplicates", "far and near"])
def test_losses_and_gradients_keep_theirs(inputs, device):
    x, y = INPUTS[inputs](*rows(device, 9))
    x = x[:, :70]  # rounding adds up over them
    labels = (torch.arange(70, device=device) % 60).expand(TASKS, -1)
    weight = torch.linspace(0.5, 1.5, labels.numel(), device=device).view(labels.shape)

    def results(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
        loss = fm.prototype_loss(x, labels, y, reduction="none")
        grads = torch.autograd.grad(loss, (x, y), weight.to(loss.dtype))
        return loss.detach(), *grads

    actual = results(x, y)
    with fm.use_backend("torch"):
        exact = results(x.double(), y.double())
    # On a CPU matrix products make the gradients, which end with the last digit of the rows; on a
    # GPU their differences do.
    of_rows = 0.0 if EMULATED or device == "cuda" else 1e-6 * x.abs().max().item()
    for a, e, rounding in zip(actual, exact, (0.0, of_rows, of_rows), strict=True):
        assert (a.double() - e).abs().max() <= 1e-5 * e.abs().max() + rounding


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean", "cosine", "dot"])
def test_rows_that_are_not_finite_spoil_no_others(metric, value, device):
    x, y = rows(device, 7)
    clean = fm.pairwise_distance(x, y, metric)
    x[:, 3, 2] = value
    y[:, 100, 5] = value
    distance = fm.pairwise_distance(x, y, metric)
    is_clean = torch.ones_like(distance, dtype=torch.bool)
    is_clean[:, 3] = False
    is_clean[:, :, 100] = False
    assert (~distance[~is_clean].isfinite()).all()
    torch.testing.assert_close(distance[is_clean], clean[is_clean], rtol=5e-6, atol=1e-6)
