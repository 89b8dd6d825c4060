"""The Hessian-vector product of the functional engine, by itself and as MAML offers it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import fastmeta as fm
from fastmeta.core.parameter_layout import ParameterLayout
from fastmeta.engines.base import Examples, InnerLoopOptions
from fastmeta.engines.functional.engine import FunctionalEngine
from tests.helpers.networks import (
    NETWORKS,
    build,
    classification,
    regression,
    regressor,
    relative_error,
)
from tests.helpers.skips import MODES, skip_without_forward_derivative
from tests.helpers.unrolled import twice_differentiable

EXACT = 1e-10


def points(net: nn.Module, tasks: int = 3) -> tuple[Tensor, Tensor]:
    """Parameters near the network's own and a direction, ``[T, P]``."""
    generator = torch.Generator().manual_seed(4)
    layout = ParameterLayout.of(net)
    shape = (2, tasks, layout.numel)
    noise, vector = torch.randn(shape, generator=generator, dtype=torch.float64).to(layout.device)
    own = torch.cat([p.detach().flatten() for p in net.parameters()])
    return own + 0.05 * noise, vector


def by_autograd(net: nn.Module, theta: Tensor, x: Tensor, y: Tensor, vector: Tensor) -> Tensor:
    """Double backward, task by task."""
    layout, rows = ParameterLayout.of(net), []
    with twice_differentiable():
        for own, x_t, y_t, v in zip(theta.detach(), x, y, vector, strict=True):
            own = own.clone().requires_grad_()
            loss = F.cross_entropy(functional_call(net, layout.views(own), (x_t,)), y_t)
            grad = torch.autograd.grad(loss, own, create_graph=True)[0]
            rows.append(torch.autograd.grad(grad, own, v)[0])
    return torch.stack(rows)


@pytest.mark.parametrize("chunk", [None, 1, 2])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_and_mode_against_autograd(name, mode, chunk, device):
    skip_without_forward_derivative(name, mode, device)
    net, tasks = build(name, device), classification(name, device)
    theta, vector = points(net)
    expected = by_autograd(net, theta, *tasks[:2], vector)
    engine = FunctionalEngine(
        net, F.cross_entropy, InnerLoopOptions(hvp_mode=mode, task_chunk=chunk)
    )
    actual = engine.hvp(theta, Examples(*tasks[:2], role=""), vector)
    assert relative_error(actual, expected) < (1e-5 if mode == "finite_difference" else EXACT)


@pytest.mark.parametrize("mode", MODES)
def test_the_learners_product_is_that_of_the_op(mode, device):
    net, tasks = build("mlp", device), classification("mlp", device)
    theta, vector = points(net)
    views = ParameterLayout.of(net).views

    def loss(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(net, views(theta), (x,)), y)

    expected = fm.hvp(loss, theta, vector, *tasks[:2], mode=mode)
    actual = fm.MAML(net, hvp_mode=mode).hvp(theta, tasks[:2], vector)
    assert relative_error(actual, expected) < EXACT


@pytest.mark.parametrize("chunk", [None, 1, 2])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NETWORKS)
def test_many_vectors_and_the_gauss_newton_matrix(name, mode, chunk, device):
    skip_without_forward_derivative(name, mode, device)
    net, tasks = build(name, device), classification(name, device)
    theta, vector = points(net)
    many, examples = torch.stack([vector, vector.flip(1)]), Examples(*tasks[:2], role="")
    engine = FunctionalEngine(
        net, F.cross_entropy, InnerLoopOptions(hvp_mode=mode, task_chunk=chunk)
    )
    tolerance = 1e-5 if mode == "finite_difference" else EXACT
    for v, product in zip(many, engine.hvp(theta, examples, many), strict=True):
        assert relative_error(product, by_autograd(net, theta, *tasks[:2], v)) < tolerance
    exact = FunctionalEngine(net, F.cross_entropy)
    products = engine.ggnvp(theta, examples, many)
    for v, product in zip(many, products, strict=True):
        assert relative_error(product, exact.ggnvp(theta, examples, v)) < tolerance
    # Positive semidefinite, as the cross entropy is convex in the outputs.
    assert ((products * many).sum(-1) > 0).all()


def test_parameters_and_vectors_that_tasks_share(device):
    net, tasks = build("mlp", device), classification("mlp", device)
    maml = fm.MAML(net)
    theta, vector = points(net, tasks=1)
    expected = maml.hvp(theta.expand(3, -1), tasks[:2], vector.expand(3, -1))
    assert expected.shape == (3, 83)
    assert torch.equal(maml.hvp(theta[0], tasks[:2], vector[0]), expected)


def test_a_vector_of_little_length_keeps_its_digits_beside_others(device):
    net, tasks = build("attention", device), classification("attention", device)
    theta, vector = points(net)
    scale = torch.tensor([[1.0], [1e-9], [1e9]], dtype=torch.float64, device=device)
    maml = fm.MAML(net, hvp_mode="finite_difference")
    expected = maml.hvp(theta, tasks[:2], vector)
    assert relative_error(maml.hvp(theta, tasks[:2], scale * vector) / scale, expected) < 1e-6


@pytest.mark.parametrize("name", ["hvp", "ggnvp"])
@pytest.mark.parametrize("options", [{}, {"task_chunk": 1}, {"hvp_mode": "forward"}])
def test_the_product_is_differentiable(options, name, device):
    net, tasks = regressor(device), regression(device, tasks=2, examples=3)
    engine = FunctionalEngine(net, F.mse_loss, InnerLoopOptions(**options))
    theta, vector = points(net, tasks=2)
    inputs = [tensor.requires_grad_() for tensor in (theta, *tasks[:2], vector)]

    def product(params, x, y, vector):
        return getattr(engine, name)(params, Examples(x, y, role=""), vector)

    assert torch.autograd.gradcheck(product, inputs)


def test_without_gradients_the_product_is_the_same(device):
    net, tasks = build("mlp", device), classification("mlp", device)
    theta, vector = points(net)
    maml = fm.MAML(net)
    expected = maml.hvp(theta, tasks[:2], vector)
    with torch.no_grad():
        actual = maml.hvp(theta.requires_grad_(), tasks[:2], vector)
    assert not actual.requires_grad
    assert torch.equal(actual, expected)


class Counter(nn.Module):
    """Writes what a task computes into a floating-point buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += self.linear(x).mean(0).detach()
        return self.linear(x).tanh() + self.seen


@pytest.mark.parametrize("chunk", [None, 1])
def test_a_module_that_writes_into_its_buffers(chunk, device):
    net, tasks = Counter().double().to(device), classification("mlp", device)
    theta, vector = points(net)
    actual = fm.MAML(net, task_chunk=chunk).hvp(theta, tasks[:2], vector)
    assert not net.seen.any()
    each = fm.MAML(net)
    rows = zip(theta, *tasks[:2], vector, strict=True)
    single = [each.hvp(t, (x[None], y[None]), v) for t, x, y, v in rows]
    assert relative_error(actual, torch.cat(single)) < EXACT


THETA = torch.zeros(3, 83, dtype=torch.float64)
TASKS = classification("mlp", "cpu")
PAIR = TASKS[:2]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"params": None}, TypeError, "params: expected a tensor, got NoneType"),
        ({"params": THETA[:2]}, ValueError, r"params: .* \[83\] or \[3, 83\], got \[2, 83\]"),
        ({"params": THETA.float()}, TypeError, "params: expected dtype torch.float64"),
        ({"vector": THETA[:, 1:]}, ValueError, r"vector: .* \[83\] or \[3, 83\], got \[3, 82\]"),
        (
            {"vector": THETA.expand(2, 2, 3, 83)},
            ValueError,
            r"vector: .* \[83\] or \[3, 83\], got \[2, 2, 3, 83\]",
        ),
        (
            {"vector": THETA[:2].expand(5, 2, 83)},
            ValueError,
            r"vector: .* or \[5, 3, 83\], got \[5, 2, 83\]",
        ),
        ({"vector": THETA.to("meta")}, ValueError, "vector: expected device cpu, got meta"),
        ({"batch": PAIR[0]}, TypeError, r"batch: expected inputs .* got Tensor"),
        ({"batch": TASKS}, ValueError, r"batch: expected a pair \(x, y\), got 4 entries"),
        ({"batch": (PAIR[0], [1])}, TypeError, "y: expected a tensor, got list"),
        ({"batch": (PAIR[0][:0], PAIR[1])}, ValueError, "x: expected .* at least one task"),
        ({"batch": (PAIR[0], PAIR[1][:2])}, ValueError, r"y: expected shape \[3, 6, ...\], got"),
        ({"batch": (PAIR[0].float(), PAIR[1])}, TypeError, "x: expected dtype torch.float64"),
        ({"batch": (PAIR[0], PAIR[1] + 4)}, ValueError, r"y: expected labels in 0..3"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    arguments = {"params": THETA, "batch": PAIR, "vector": THETA, **change}
    maml = fm.MAML(build("mlp", "cpu"))
    for product in (maml.hvp, maml.ggnvp):
        with pytest.raises(error, match=message):
            product(**arguments)


def test_inference_mode_is_refused_with_the_reason(device):
    net, tasks = build("mlp", device), classification("mlp", device)
    theta, vector = points(net)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"use torch.no_grad\(\)"):
        fm.MAML(net, engine="functional").hvp(theta, tasks[:2], vector)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("chunk", [None, 1])
def test_squared_errors_in_forward_mode_of_one_task_and_of_all(chunk, reduction, device):
    """PyTorch's own forward derivative of their gradient raises without vmap."""
    net, tasks = build("mlp", device), classification("mlp", device)
    theta, vector = points(net)
    y = F.one_hot(tasks.support_y, net(tasks.support_x[0]).shape[-1]).double()

    def product(mode: str) -> Tensor:
        def loss(outputs: Tensor, targets: Tensor) -> Tensor:
            return F.mse_loss(outputs, targets, reduction=reduction)

        engine = FunctionalEngine(net, loss, InnerLoopOptions(hvp_mode=mode, task_chunk=chunk))
        return engine.hvp(theta, Examples(tasks.support_x, y, role=""), vector)

    assert relative_error(product("forward"), product("reverse")) < EXACT
