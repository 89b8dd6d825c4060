"""Hessian-vector products of many tasks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends import cudnn
from torch.func import functional_call, grad, vmap

import fastmeta as fm
from tests.helpers.networks import (
    NETWORKS,
    build,
    classification,
    parameters_of_tasks,
    regression,
    regressor,
    relative_error,
)
from tests.helpers.skips import MODES, skip_without_forward_derivative
from tests.helpers.unrolled import twice_differentiable

TOLERANCE = {"reverse": 1e-10, "forward": 1e-10, "finite_difference": 1e-7}


def rosenbrock(theta: Tensor, a: Tensor) -> Tensor:
    return ((1 - theta[:-1]) ** 2 + a * (theta[1:] - theta[:-1] ** 2) ** 2).sum()


def points(device: str, tasks: int = 4, size: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    theta, v = torch.randn(2, tasks, size, generator=generator, dtype=torch.float64).to(device)
    a = 1 + torch.rand(tasks, generator=generator, dtype=torch.float64)
    return theta, v, a.to(device)


def expected_rosenbrock(theta: Tensor, v: Tensor, a: Tensor) -> Tensor:
    def one_task(theta: Tensor, v: Tensor, a: Tensor) -> Tensor:
        return torch.autograd.functional.hvp(lambda t: rosenbrock(t, a), theta, v)[1]

    return torch.stack([one_task(*row) for row in zip(theta, v, a, strict=True)])


@pytest.mark.parametrize("mode", MODES)
def test_against_torch_task_by_task(mode, device):
    theta, v, a = points(device)
    actual = fm.hvp(rosenbrock, theta, v, a, mode=mode)
    assert relative_error(actual, expected_rosenbrock(theta, v, a)) < TOLERANCE[mode]


@pytest.mark.parametrize("mode", MODES)
def test_one_task(mode, device):
    theta, v, a = points(device, tasks=1)
    actual = fm.hvp(rosenbrock, theta, v, a, mode=mode)
    assert relative_error(actual, expected_rosenbrock(theta, v, a)) < TOLERANCE[mode]


@pytest.mark.parametrize("mode", MODES)
def test_no_tasks_give_an_empty_result(mode, device):
    theta, v, a = points(device, tasks=0)
    assert fm.hvp(rosenbrock, theta, v, a, mode=mode).shape == (0, 5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name, mode, device):
    """Against double backward, one task at a time, with parameters of each task's own."""
    skip_without_forward_derivative(name, mode, device)
    net, tasks = build(name, device), classification(name, device)
    params, vector = parameters_of_tasks(net, device)

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(net, params, (x,)), y)

    with cudnn.flags(enabled=name != "gru"):
        actual = fm.hvp(loss, params, vector, tasks.support_x, tasks.support_y, mode=mode)
    with twice_differentiable():
        for t in range(3):
            own = [p[t].clone().requires_grad_() for p in params.values()]
            named = dict(zip(params, own, strict=True))
            value = F.cross_entropy(
                functional_call(net, named, (tasks.support_x[t],)), tasks.support_y[t]
            )
            grads = torch.autograd.grad(value, own, create_graph=True)
            wanted = torch.autograd.grad(grads, own, [v[t] for v in vector.values()])
            flat = torch.cat([g.flatten() for g in wanted])
            got = torch.cat([actual[n][t].flatten() for n in params])
            tolerance = 1e-5 if mode == "finite_difference" else 1e-10
            assert relative_error(got, flat) < tolerance


@pytest.mark.parametrize("mode", MODES)
def test_mean_squared_error(mode, device):
    net, tasks = regressor(device), regression(device)
    params = {n: p.detach().expand(3, *p.shape) for n, p in net.named_parameters()}
    vector = {n: torch.randn_like(p) for n, p in params.items()}

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(functional_call(net, params, (x,)), y)

    actual = fm.hvp(loss, params, vector, *tasks[:2], mode=mode)
    expected = fm.hvp(loss, params, vector, *tasks[:2])
    for name in params:
        assert relative_error(actual[name], expected[name]) < TOLERANCE[mode]


@pytest.mark.parametrize("mode", MODES)
def test_nested_trees(mode, device):
    theta, v, a = points(device)

    def loss(tree, a: Tensor) -> Tensor:
        return rosenbrock(torch.cat([tree["head"], *tree["rest"][0]]), a)

    def tree(flat: Tensor) -> dict:
        return {"head": flat[:, :2], "rest": [(flat[:, 2:3], flat[:, 3:])]}

    actual = fm.hvp(loss, tree(theta), tree(v), a, mode=mode)
    flat = torch.cat([actual["head"], *actual["rest"][0]], dim=1)
    assert relative_error(flat, expected_rosenbrock(theta, v, a)) < TOLERANCE[mode]


@pytest.mark.parametrize("mode", MODES)
def test_a_zero_vector_gives_zero(mode, device):
    theta, v, a = points(device)
    v[1] = 0
    actual = fm.hvp(rosenbrock, theta, v, a, mode=mode)
    assert not actual[1].any()
    assert relative_error(actual, expected_rosenbrock(theta, v, a)) < TOLERANCE[mode]


def test_finite_differences_do_not_depend_on_the_vectors_length(device):
    theta, v, a = points(device)
    expected = fm.hvp(rosenbrock, theta, v, a, mode="finite_difference")
    for scale in (1e-12, 1e12):
        actual = fm.hvp(rosenbrock, theta, scale * v, a, mode="finite_difference") / scale
        assert relative_error(actual, expected) < 1e-7


def test_finite_differences_in_float32(device):
    theta, v, a = (t.float() for t in points(device))
    actual = fm.hvp(rosenbrock, theta, v, a, mode="finite_difference")
    assert relative_error(actual, expected_rosenbrock(theta, v, a)) < 1e-3


def test_finite_differences_draw_the_same_random_numbers_on_both_sides(device):
    theta, v, _ = points(device)

    def loss(theta: Tensor) -> Tensor:
        return (F.dropout(theta, 0.5) ** 4).sum()

    torch.manual_seed(0)
    expected = fm.hvp(loss, theta, v)
    after = torch.rand(2, device=device)
    torch.manual_seed(0)
    actual = fm.hvp(loss, theta, v, mode="finite_difference")
    assert relative_error(actual, expected) < 1e-7
    assert torch.equal(torch.rand(2, device=device), after)


@pytest.mark.parametrize("mode", MODES)
def test_under_vmap(mode, device):
    theta, v, a = points(device)
    vectors = torch.stack([v, -2 * v, v.flip(0)])
    actual = vmap(lambda u: fm.hvp(rosenbrock, theta, u, a, mode=mode))(vectors)
    expected = torch.stack([expected_rosenbrock(theta, u, a) for u in vectors])
    assert relative_error(actual, expected) < TOLERANCE[mode]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tasks", [1, 4])
def test_many_vectors_at_one_point(tasks, mode, device):
    theta, v, a = points(device, tasks)
    vectors = torch.stack([v, -2 * v, v.flip(1)])
    actual = fm.hvp(lambda tree, a: rosenbrock(tree[0], a), [theta], [vectors], a, mode=mode)[0]
    assert actual.shape == vectors.shape
    for product, vector in zip(actual, vectors, strict=True):
        assert relative_error(product, expected_rosenbrock(theta, vector, a)) < TOLERANCE[mode]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("vectors", "tasks"), [(0, 4), (3, 0), (0, 0)])
def test_no_vectors_or_no_tasks_give_an_empty_result(vectors, tasks, mode, device):
    theta, v, a = points(device, tasks)
    product = fm.hvp(rosenbrock, theta, v.expand(vectors, tasks, 5), a, mode=mode)
    assert product.shape == (vectors, tasks, 5)


def test_a_product_with_many_vectors_is_differentiable(device):
    theta, v, a = points(device, tasks=2, size=3)
    inputs = [t.requires_grad_() for t in (theta, torch.stack([v, v.flip(1)]), a)]
    assert torch.autograd.gradcheck(lambda *args: fm.hvp(rosenbrock, *args), inputs)


def test_reverse_mode_is_differentiable(device):
    theta, v, a = (t.requires_grad_() for t in points(device, tasks=2, size=3))
    assert torch.autograd.gradcheck(lambda *args: fm.hvp(rosenbrock, *args), (theta, v, a))


def test_reverse_mode_under_grad(device):
    theta, v, a = points(device)
    actual = grad(lambda t: fm.hvp(rosenbrock, t, v, a).square().sum())(theta)
    leaf = theta.clone().requires_grad_()
    expected = torch.autograd.grad(fm.hvp(rosenbrock, leaf, v, a).square().sum(), leaf)[0]
    assert relative_error(actual, expected) < 1e-10


def test_inputs_are_not_modified(device):
    inputs = points(device)
    before = [t.clone() for t in inputs]
    for mode in MODES:
        fm.hvp(rosenbrock, *inputs, mode=mode)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


ZEROS = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("params", "vector", "batch", "error", "message"),
    [
        ({"a": ZEROS}, {"b": ZEROS}, (), ValueError, "vector: expected the tree of params"),
        ({"a": ZEROS}, [ZEROS], (), ValueError, "vector: expected the tree of params"),
        (ZEROS, torch.zeros(2, 4), (), ValueError, r"\[2, 3\] or \[K, 2, 3\], got \[2, 4\]"),
        (
            ZEROS,
            torch.zeros(2, 3, 3),
            (),
            ValueError,
            r"expected shape \[2, 2, 3\], got \[2, 3, 3\]",
        ),
        (
            [ZEROS, ZEROS],
            [torch.zeros(4, 2, 3), torch.zeros(5, 2, 3)],
            (),
            ValueError,
            r"vector: expected shape \[4, 2, 3\], got \[5, 2, 3\]",
        ),
        (
            [ZEROS, ZEROS],
            [torch.zeros(4, 2, 3), ZEROS],
            (),
            ValueError,
            r"\[4, 2, 3\], got \[2, 3\]",
        ),
        (ZEROS, ZEROS.double(), (), TypeError, "expected dtype torch.float32, got torch.float64"),
        (ZEROS, ZEROS.to("meta"), (), ValueError, "vector: expected device cpu, got meta"),
        (ZEROS, ZEROS, (torch.zeros(3, 1),), ValueError, r"expected 2 tasks .* got \[2, 3\]"),
        ([ZEROS, ZEROS[:1]], [ZEROS, ZEROS[:1]], (), ValueError, "expected 2 tasks"),
        (ZEROS, ZEROS, (0.5,), TypeError, "batch: expected tensors, got float"),
        ([ZEROS, 1.0], [ZEROS, 1.0], (), TypeError, "params: expected tensors, got float"),
        (torch.tensor(1.0), torch.tensor(1.0), (), ValueError, r"params: .* got a scalar"),
        ((), (), (), ValueError, "params: expected at least one tensor"),
    ],
)
def test_arguments_that_do_not_match_are_named(params, vector, batch, error, message):
    with pytest.raises(error, match=message):
        fm.hvp(lambda *_: torch.zeros(()), params, vector, *batch)


def test_a_loss_that_is_no_scalar_is_refused():
    with pytest.raises(ValueError, match=r"loss_fn: expected a scalar tensor, got \[3\]"):
        fm.hvp(lambda theta: theta, ZEROS, ZEROS)


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match=r"mode: expected one of .* got 'exact'"):
        fm.hvp(rosenbrock, *points("cpu"), mode="exact")
