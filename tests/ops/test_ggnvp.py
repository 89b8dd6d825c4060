"""Gauss-Newton-vector products of many tasks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap

import fastmeta as fm
from tests.helpers.networks import (
    NETWORKS,
    build,
    classification,
    parameters_of_tasks,
    relative_error,
)
from tests.helpers.skips import MODES, skip_without_forward_derivative
from tests.helpers.unrolled import twice_differentiable

TOLERANCE = {"reverse": 1e-10, "forward": 1e-10, "finite_difference": 1e-5}


def forward(theta: Tensor, x: Tensor) -> Tensor:
    weight, bias = theta[:6].view(3, 2), theta[6:]
    return (x @ weight).tanh() * bias


def loss(outputs: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(outputs, y)


def points(device: str, tasks: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    theta, v = torch.randn(2, tasks, 8, generator=generator, dtype=torch.float64)
    x = torch.randn(tasks, 5, 3, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 2, (tasks, 5), generator=generator)
    return theta.to(device), v.to(device), x.to(device), y.to(device)


def matrix(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """``J' H_L J`` of one task ``[P, P]``, with both factors formed."""
    outputs = forward(theta, x)
    jacobian = jacrev(forward)(theta, x).flatten(0, 1)
    bend = hessian(loss)(outputs, y).reshape(outputs.numel(), outputs.numel())
    return jacobian.T @ bend @ jacobian


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tasks", [1, 3])
def test_it_is_the_product_with_the_matrix(tasks, mode, device):
    theta, v, x, y = points(device, tasks)
    expected = torch.stack([matrix(*task) @ u for *task, u in zip(theta, x, y, v, strict=True)])
    actual = fm.ggnvp(forward, loss, theta, v, x, y, mode=mode)
    assert relative_error(actual, expected) < TOLERANCE[mode]


@pytest.mark.parametrize("mode", MODES)
def test_many_vectors_are_each_multiplied(mode, device):
    theta, v, x, y = points(device)
    vectors = torch.stack([v, v.flip(1), 3 * v])
    actual = fm.ggnvp(
        lambda tree, x: forward(tree[0], x), loss, [theta], [vectors], x, y, mode=mode
    )[0]
    one_by_one = [fm.ggnvp(forward, loss, theta, u, x, y, mode=mode) for u in vectors]
    assert relative_error(actual, torch.stack(one_by_one)) < 1e-14


@pytest.mark.parametrize(("vectors", "tasks"), [(0, 3), (2, 0)])
def test_no_vectors_or_no_tasks_give_an_empty_result(vectors, tasks, device):
    theta, v, x, y = points(device, tasks)
    product = fm.ggnvp(forward, loss, theta, v.expand(vectors, tasks, 8), x, y)
    assert product.shape == (vectors, tasks, 8)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name, mode, device):
    """Against ``J'`` times the tangent of the loss's gradient, one task at a time."""
    skip_without_forward_derivative(name, mode, device)
    net, tasks = build(name, device), classification(name, device)
    params, vector = parameters_of_tasks(net, device)

    def outputs_at(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(net, params, (x,))

    x, y = tasks.support_x, tasks.support_y
    with torch.backends.cudnn.flags(enabled=name != "gru"):
        actual = fm.ggnvp(outputs_at, loss, params, vector, x, y, mode=mode)
    with twice_differentiable():
        for t in range(3):
            own = {n: p[t].clone().requires_grad_() for n, p in params.items()}
            outputs = outputs_at(own, x[t])
            # <J' u, v> is linear in u: its gradient there is J v.
            u = torch.zeros_like(outputs, requires_grad=True)
            grads = torch.autograd.grad(outputs, list(own.values()), u, create_graph=True)
            along = torch.autograd.grad(grads, u, [v[t] for v in vector.values()])[0]
            bent = jvp(grad(lambda z, t=t: loss(z, y[t])), (outputs.detach(),), (along,))[1]
            wanted = torch.autograd.grad(outputs, list(own.values()), bent)
            got = torch.cat([actual[n][t].flatten() for n in params])
            flat = torch.cat([g.flatten() for g in wanted])
            assert relative_error(got, flat) < TOLERANCE[mode]


def test_it_is_the_hessian_of_a_linear_network(device):
    theta, v, x, y = points(device)
    theta, v = theta[:, :6].view(3, 3, 2), v[:, :6].view(3, 3, 2)
    actual = fm.ggnvp(lambda w, x: x @ w, loss, theta, v, x, y)
    expected = fm.hvp(lambda w, x, y: loss(x @ w, y), theta, v, x, y)
    assert relative_error(actual, expected) < 1e-12


def test_under_vmap(device):
    theta, v, x, y = points(device)
    vectors = torch.stack([v, -2 * v])
    actual = vmap(lambda u: fm.ggnvp(forward, loss, theta, u, x, y))(vectors)
    assert relative_error(actual, fm.ggnvp(forward, loss, theta, vectors, x, y)) < 1e-14


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_it_is_differentiable(mode, device):
    theta, v, x, y = points(device, tasks=2)
    inputs = [t.requires_grad_() for t in (theta, v, x)]

    def product(theta: Tensor, v: Tensor, x: Tensor) -> Tensor:
        return fm.ggnvp(forward, loss, theta, v, x, y, mode=mode)

    assert torch.autograd.gradcheck(product, inputs)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mode": "exact"}, ValueError, r"mode: expected one of .* got 'exact'"),
        ({"x": torch.zeros(2, 5, 3)}, ValueError, r"params and x and y: expected 3 tasks"),
        ({"y": 0}, TypeError, "y: expected tensors, got int"),
        (
            {"vector": torch.zeros(3, 7)},
            ValueError,
            r"vector: expected shape \[3, 8\] or \[K, 3, 8\]",
        ),
        (
            {"loss_fn": lambda z, y: z},
            ValueError,
            r"loss_fn: expected a scalar tensor, got \[5, 2\]",
        ),
        ({"forward": lambda p, x: [p]}, TypeError, "forward: expected a tensor, got list"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, error, message):
    theta, v, x, y = points("cpu")
    arguments = {"forward": forward, "loss_fn": loss, "params": theta, "vector": v, "x": x, "y": y}
    with pytest.raises(error, match=message):
        fm.ggnvp(**{**arguments, **change})
