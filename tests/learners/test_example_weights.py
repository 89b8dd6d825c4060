"""Weights of examples in ProtoNet and ANIL."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta as fm
from tests.helpers.networks import joined, relative_error

EXACT = 1e-10
TASKS, WAYS = 2, 3


class Batch:
    """Examples of two tasks and their weights, which require a gradient."""

    def __init__(self, device: str) -> None:
        torch.manual_seed(0)
        options: Any = {"dtype": torch.float64, "device": device}
        self.x, self.query_x = (
            torch.randn(TASKS, 6, 5, **options),
            torch.randn(TASKS, 7, 5, **options),
        )
        self.y = torch.arange(6, device=device).remainder(WAYS).repeat(TASKS, 1)
        self.query_y = torch.randint(0, WAYS, (TASKS, 7), device=device)
        self.weight = torch.rand(TASKS, 6, **options).requires_grad_()
        self.query_weight = torch.rand(TASKS, 7, **options).requires_grad_()

    @property
    def data(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.x, self.y, self.query_x, self.query_y

    @property
    def weights(self) -> dict[str, Tensor]:
        return {"support_weight": self.weight, "query_weight": self.query_weight}


def body(device: str) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh()).double().to(device)


def mean_of(losses: Tensor, weight: Tensor) -> Tensor:
    return (weight * losses).sum() / weight.sum()


def protonet_loss(encoder: nn.Module, b: Batch) -> Tensor:
    values = []
    for t in range(TASKS):
        z, q, w = encoder(b.x[t]), encoder(b.query_x[t]), b.weight[t]
        rows = [(b.y[t] == n).double() * w for n in range(WAYS)]
        centres = torch.stack([(row[:, None] * z).sum(0) / row.sum() for row in rows])
        logits = -(q[:, None] - centres).square().sum(-1)
        losses = F.cross_entropy(logits, b.query_y[t], reduction="none")
        values.append(mean_of(losses, b.query_weight[t]))
    return torch.stack(values).mean()


def anil_loss(net: nn.Module, head: nn.Linear, b: Batch, decay: float) -> Tensor:
    values = []
    for t in range(TASKS):
        z, q = net(b.x[t]), net(b.query_x[t])
        params = [head.weight, head.bias]
        for _ in range(3):
            losses = F.cross_entropy(F.linear(z, *params), b.y[t], reduction="none")
            grads = torch.autograd.grad(mean_of(losses, b.weight[t]), params, create_graph=True)
            params = [p - 0.2 * (g + decay * p) for p, g in zip(params, grads, strict=True)]
        losses = F.cross_entropy(F.linear(q, *params), b.query_y[t], reduction="none")
        values.append(mean_of(losses, b.query_weight[t]))
    return torch.stack(values).mean()


def assert_gradients_equal(found: Tensor, expected: Tensor, sources: list[Tensor]) -> None:
    assert relative_error(found, expected) < EXACT
    pairs = (torch.autograd.grad(value, sources) for value in (found, expected))
    for grad, exact in zip(*pairs, strict=True):
        assert relative_error(grad, exact) < EXACT


def test_protonet_weighs_examples(device):
    net, b = body(device), Batch(device)
    loss, _ = fm.ProtoNet(net).meta_loss(*b.data, **b.weights)
    assert_gradients_equal(loss, protonet_loss(net, b), [*net.parameters(), *b.weights.values()])


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_anil_weighs_examples(decay, device):
    net, b = body(device), Batch(device)
    head = nn.Linear(4, WAYS).double().to(device)
    anil = fm.ANIL(net, head, lr=0.2, steps=3, weight_decay=decay)
    loss, outputs = anil.meta_loss(*b.data, **b.weights)
    assert outputs.shape == (TASKS, 7, WAYS)
    sources = [*net.parameters(), *head.parameters(), *b.weights.values()]
    assert_gradients_equal(loss, anil_loss(net, head, b, decay), sources)


@pytest.mark.parametrize("kind", ["protonet", "anil"])
def test_weights_of_one_are_none(kind, device):
    net, b = body(device), Batch(device)
    learner = fm.ProtoNet(net) if kind == "protonet" else head_on(net, device)
    ones = {name: torch.ones_like(w) for name, w in b.weights.items()}
    grads = []
    for weights in ({}, ones):
        loss, _ = learner.meta_loss(*b.data, **weights)
        grads.append(joined(torch.autograd.grad(loss, list(learner.parameters()))))
    assert relative_error(grads[1], grads[0]) < EXACT


def head_on(net: nn.Module, device: str) -> fm.ANIL:
    torch.manual_seed(2)
    return fm.ANIL(net, nn.Linear(4, WAYS).double().to(device), lr=0.2, steps=3)


@pytest.mark.parametrize("kind", ["protonet", "anil"])
def test_an_example_of_weight_zero_is_absent(kind, device):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)).double().to(device)
    b = Batch(device)
    learner = fm.ProtoNet(net) if kind == "protonet" else head_on(net, device)
    weights = {name: w.detach().clone() for name, w in b.weights.items()}
    weights["support_weight"][:, 3:] = 0
    weights["query_weight"][:, 4:] = 0
    grads = []
    for s, q in ((6, 7), (3, 4)):
        data = (part[:, :n] for part, n in zip(b.data, (s, s, q, q), strict=True))
        some = {n: w[:, : s if n == "support_weight" else q] for n, w in weights.items()}
        loss, _ = learner.meta_loss(*data, **some)
        grads.append(joined(torch.autograd.grad(loss, list(learner.parameters()))))
    assert relative_error(grads[1], grads[0]) < EXACT


def test_adapted_prototypes_are_weighted(device):
    b = Batch(device)
    weight = b.weight.detach().clone()
    weight[:, [0, 3]] = 0  # all of class 0
    adapted = fm.ProtoNet(nn.Identity()).adapt_tasks(b.x, b.y, num_classes=3, support_weight=weight)
    expected = (weight[0, [1, 4], None] * b.x[0, [1, 4]]).sum(0) / weight[0, [1, 4]].sum()
    assert relative_error(adapted.prototypes[0, 1], expected) < EXACT
    assert (adapted(b.query_x)[..., 0] == -torch.inf).all()


@pytest.mark.parametrize("kind", ["protonet", "anil"])
@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (torch.ones(2, 5), ValueError, r"support_weight: expected shape \[2, 6\], got \[2, 5\]"),
        (torch.ones(2, 6).long(), TypeError, "support_weight: expected a floating-point tensor"),
        ([1.0], TypeError, "support_weight: expected a"),
    ],
)
def test_bad_weights_are_named(kind, weight, error, message):
    net, b = body("cpu"), Batch("cpu")
    learner = fm.ProtoNet(net) if kind == "protonet" else head_on(net, "cpu")
    with pytest.raises(error, match=message):
        learner.meta_loss(*b.data, support_weight=weight)
