"""Losses of each task, and outputs that are differentiable again."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta as fm
from tests.helpers.networks import build, classification, joined, relative_error

EXACT = 1e-10

each_engine = pytest.mark.parametrize("engine", ["functional", "auto"])


def grads_of(net: nn.Module) -> Tensor:
    grads = joined(torch.zeros_like(p) if p.grad is None else p.grad for p in net.parameters())
    net.zero_grad()
    return grads


@each_engine
@pytest.mark.parametrize("adapt", [None, "4.*"])
@pytest.mark.parametrize("name", ["mlp", "conv4"])
def test_losses_of_each_task(name, adapt, engine, device):
    net, tasks = build(name, device), classification(name, device)
    adapt = adapt and list(dict(net.named_parameters()))[-2:]
    maml = fm.MAML(net, 0.1, 2, adapt=adapt, engine=engine)
    losses, outputs = maml.meta_loss(*tasks, reduction="none")
    assert losses.shape == (3,)
    assert not outputs.requires_grad
    expected, wanted = maml.meta_loss(*tasks)
    expected.backward()
    mean = grads_of(net)
    losses.mean().backward()
    assert relative_error(grads_of(net), mean) < EXACT
    assert relative_error(outputs, wanted) < EXACT
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64, device=device)
    losses, _ = maml.meta_loss(*tasks, reduction="none")
    (losses * weights).sum().backward()
    each = [maml.meta_gradient(*(x[t : t + 1] for x in tasks)) for t in range(3)]
    expected = sum(w * g.grads for w, g in zip(weights, each, strict=True))
    assert relative_error(grads_of(net)[-len(expected) :], expected) < EXACT


@each_engine
def test_a_loss_of_your_own_on_the_outputs(engine, device):
    net, tasks = build("mlp", device), classification("mlp", device)
    maml = fm.MAML(net, 0.1, 2, engine=engine)
    loss, outputs = maml.meta_loss(*tasks, differentiable_outputs=True)
    F.cross_entropy(outputs.flatten(0, 1), tasks.query_y.flatten()).backward(retain_graph=True)
    own = grads_of(net)
    loss.backward()
    assert relative_error(grads_of(net), own) < EXACT
    maml.meta_loss(*tasks)[0].backward()
    assert relative_error(grads_of(net), own) < EXACT


@each_engine
def test_with_weights_and_a_start(engine, device):
    net, tasks = build("mlp", device), classification("mlp", device)
    maml = fm.MAML(net, 0.1, 2, engine=engine)
    torch.manual_seed(0)
    start = joined(net.parameters()).detach().repeat(3, 1).requires_grad_()
    weights = [torch.rand(3, n, dtype=torch.float64, device=device) for n in (6, 5)]
    sources = [start, *(w.requires_grad_() for w in weights)]
    options = {"start": start, "support_weight": weights[0], "query_weight": weights[1]}
    expected = torch.autograd.grad(maml.meta_loss(*tasks, **options)[0], sources)
    losses, _ = maml.meta_loss(*tasks, **options, reduction="none")
    for a, e in zip(torch.autograd.grad(losses.mean(), sources), expected, strict=True):
        assert relative_error(a, e) < EXACT


def test_under_torch_compile(device):
    net, tasks = build("mlp", device), classification("mlp", device)
    maml = fm.MAML(net, 0.1)
    compiled = torch.compile(lambda *data: maml.meta_loss(*data, reduction="none")[0].square())
    assert torch.equal(compiled(*tasks), maml.meta_loss(*tasks, reduction="none")[0].square())


def test_what_does_not_fit(device):
    net, tasks = build("mlp", device), classification("mlp", device)
    maml = fm.MAML(net, 0.1, 2)
    with pytest.raises(ValueError, match="reduction: expected"):
        maml.meta_loss(*tasks, reduction="sum")
    with pytest.raises(ValueError, match="step_weights: expected None with reduction"):
        maml.meta_loss(*tasks, [0.5, 0.5], reduction="none")
    with pytest.raises(ValueError, match="query_y: expected shape"):
        maml.meta_loss(*tasks[:3], tasks.query_y[:, :2], reduction="none")
