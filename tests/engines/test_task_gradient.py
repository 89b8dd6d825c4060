"""`task_call` and `task_gradient`: a module with the parameters of each task."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, vmap

import fastmeta as fm
from tests.helpers.networks import (
    NETWORKS,
    build,
    classification,
    joined,
    regression,
    regressor,
    relative_error,
)

EXACT = 1e-10

backends = pytest.mark.parametrize("backend", ["torch", "native"])  # torch: no program


def arena_of(net: nn.Module, tasks: int) -> Tensor:
    own = joined(net.parameters()).detach()
    shifts = torch.linspace(-0.1, 0.1, tasks, dtype=own.dtype, device=own.device)
    return own + shifts[:, None]


def views(net: nn.Module, theta: Tensor) -> dict[str, Tensor]:
    return fm.MAML(net).layout.views(theta)


@backends
@pytest.mark.parametrize("name", NETWORKS)
def test_call_and_gradient_equal_a_loop(name, backend, device):
    net, (x, y, *_) = build(name, device), classification(name, device)
    theta = arena_of(net, 3)
    with fm.use_backend(backend):
        outputs = fm.task_call(net, theta, x)
        result = fm.task_gradient(net, F.cross_entropy, theta, x, y)
    twin = build(name, device).train()
    for t in range(3):
        own = {name: p[t].clone() for name, p in views(net, theta).items()}
        params = {name: p.requires_grad_() for name, p in own.items()}
        z = functional_call(twin, params, (x[t],))
        loss = F.cross_entropy(z, y[t])
        grads = torch.autograd.grad(loss, list(params.values()))
        assert relative_error(outputs[t], z) < EXACT
        assert relative_error(result.outputs[t], z) < EXACT
        assert relative_error(result.losses[t], loss) < EXACT
        assert relative_error(result.grads[t], joined(grads)) < EXACT


@backends
def test_all_derivatives(backend, device):
    net, (x, y, *_) = regressor(device), regression(device, tasks=2, examples=3)
    inputs = [arena_of(net, 2).requires_grad_(), x.requires_grad_()]

    def gradients(theta: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        with fm.use_backend(backend):
            return fm.task_gradient(net, F.mse_loss, theta, x, y)[:2]

    assert gradcheck(gradients, inputs)
    assert gradgradcheck(gradients, inputs)


def test_derivatives_in_targets_and_weights(device):
    net, (x, y, *_) = regressor(device), regression(device, tasks=2, examples=3)
    weight = torch.rand(2, 3, dtype=torch.float64, device=device).requires_grad_()
    inputs = [arena_of(net, 2).requires_grad_(), x.requires_grad_(), y.requires_grad_(), weight]
    assert gradcheck(lambda *tensors: fm.task_gradient(net, F.mse_loss, *tensors)[:2], inputs)


@backends
def test_products_of_tasks_that_share_parameters(backend, device):
    net, (x, y, *_) = build("mlp", device), classification("mlp", device)
    theta = joined(net.parameters()).detach().requires_grad_()
    v = torch.randn(3, len(theta), dtype=torch.float64, device=device)
    with fm.use_backend(backend):
        grads = fm.task_gradient(net, F.cross_entropy, theta, x, y).grads
        (product,) = torch.autograd.grad(grads, theta, v)
    expected = fm.MAML(net, engine="functional").hvp(theta.detach(), (x, y), v).sum(0)
    assert relative_error(product, expected) < EXACT


@backends
def test_a_dict_of_some_parameters_and_the_modules_own_others(backend, device):
    net, (x, y, *_) = build("mlp", device), classification("mlp", device)
    bias = torch.randn(3, 4, dtype=torch.float64, device=device, requires_grad=True)
    with fm.use_backend(backend):
        result = fm.task_gradient(net, F.cross_entropy, {"4.bias": bias}, x, y)
        result.grads.square().sum().backward()
        with torch.no_grad():
            plain = fm.task_gradient(net, F.cross_entropy, {"4.bias": bias}, x, y)
            outputs = fm.task_call(net, {"4.bias": bias}, x)
    assert result.grads.shape == (3, 4)
    assert relative_error(plain.grads, result.grads) < EXACT
    assert relative_error(outputs, result.outputs) < EXACT
    assert net[0].weight.grad.abs().max() > 0
    assert bias.grad.abs().max() > 0


@backends
def test_gradients_of_single_examples(backend, device):
    net, (x, y, *_) = build("mlp", device), classification("mlp", device)
    x, y, params = x.flatten(0, 1), y.flatten(), dict(net.named_parameters())
    with fm.use_backend(backend):
        theta = joined(net.parameters()).detach()
        found = fm.task_gradient(net, F.cross_entropy, theta, x[:, None], y[:, None]).grads

    def loss(params, x, y):
        return F.cross_entropy(functional_call(net, params, (x[None],)), y[None])

    each = vmap(grad(loss), (None, 0, 0))(params, x, y)
    assert relative_error(found, torch.cat([g.flatten(1) for g in each.values()], 1)) < EXACT


def memory(x: Tensor, y: Tensor, theta: Tensor, step) -> Tensor:
    """Reads before each of the steps of a neural memory, ``[T, C, B, n]``."""
    reads, momentum = [], torch.zeros_like(theta)
    for c in range(x.shape[1]):
        theta, momentum, read = step(theta, momentum, x[:, c], y[:, c])
        reads.append(read)
    return torch.stack(reads, 1)


@backends
@pytest.mark.parametrize(("decay", "beta"), [(0.0, 0.0), (0.02, 0.9)])
def test_a_chain_of_steps_is_a_test_time_training_layer(decay, beta, backend, device):
    """TTT without momentum, a Titans memory with momentum and decay; against plain autograd."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4)).to(device)
    x, y = torch.randn(2, 3, 5, 8, 4, device=device).unbind()
    theta = arena_of(net, 3).requires_grad_()
    rate = torch.tensor(0.1, device=device, requires_grad=True)

    def ours(theta, m, x, y):
        m = beta * m + fm.task_gradient(net, F.mse_loss, theta, x, y).grads
        after = (1 - decay) * theta - rate * m
        return after, m, fm.task_call(net, after, x)

    def naive(theta, m, x, y):
        losses = vmap(lambda p, x, y: F.mse_loss(functional_call(net, views(net, p), (x,)), y))
        (g,) = torch.autograd.grad(losses(theta, x, y).sum(), theta, create_graph=True)
        m = beta * m + g
        after = (1 - decay) * theta - rate * m
        read = vmap(lambda p, x: functional_call(net, views(net, p), (x,)))(after, x)
        return after, m, read

    sources = [theta, rate]
    with fm.use_backend(backend):
        found = memory(x, y, theta, ours)
        found_grads = torch.autograd.grad(found.square().sum(), sources)
    expected = memory(x, y, theta, naive)
    expected_grads = torch.autograd.grad(expected.square().sum(), sources)
    for a, e in zip((found, *found_grads), (expected, *expected_grads), strict=True):
        assert relative_error(a, e) < 1e-5


def test_a_delta_rule_step(device):
    """A linear memory, one token, half the squared error: W - rate (W k - v) k'."""
    net = nn.Linear(4, 3, bias=False).to(device)
    k, v = torch.randn(5, 1, 4, device=device), torch.randn(5, 1, 3, device=device)
    theta = arena_of(net, 5)
    half = fm.task_gradient(net, lambda z, y: (z - y).square().sum() / 2, theta, k, v).grads
    w = theta.view(5, 3, 4)
    expected = (w @ k.mT - v.mT) @ k
    assert relative_error(half, expected.flatten(1)) < 1e-5


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        (torch.zeros(7), ValueError, r"params: expected shape \[83\] or \[3, 83\], got \[7\]"),
        ({"9.bias": torch.zeros(3, 4)}, ValueError, r"params: expected names among .* got \['9.b"),
        ({}, ValueError, r"params: expected names among .*, got \{\}"),
        ({"4.bias": 3}, TypeError, "params: expected a tensor for '4.bias', got int"),
    ],
)
def test_parameters_that_do_not_fit(params, error, message, device):
    net, (x, y, *_) = build("mlp", device), classification("mlp", device)
    if isinstance(params, Tensor):
        params = params.double().to(device)
    with pytest.raises(error, match=message):
        fm.task_call(net, params, x)
    with pytest.raises(error, match=message):
        fm.task_gradient(net, F.cross_entropy, params, x, y)


def test_inference_mode_has_no_gradients(device):
    net, (x, y, *_) = build("mlp", device), classification("mlp", device)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference"):
        fm.task_gradient(net, F.cross_entropy, joined(net.parameters()), x, y)


def test_an_adapted_task_as_a_module(device):
    net, (x, y, *_) = build("mlp", device), classification("mlp", device)
    adapted = fm.MAML(net, 0.1, 2, adapt="4.*").adapt_tasks(x, y)
    module = adapted.as_module(1)
    assert relative_error(module(x[1]), adapted(x)[1]) < EXACT
    assert all(p.is_leaf and p.requires_grad for p in module.parameters())
    assert module[0].weight is not net[0].weight
