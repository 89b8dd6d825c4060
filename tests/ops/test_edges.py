"""What the ops do at the edges, and what they say to bad input."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import pytest
import torch

import fastmeta as fm
from tests.helpers.assertions import BACKENDS
from tests.helpers.case import METRICS, CaseFactory


class Given(NamedTuple):
    """Good arguments of the ops: T = 2, Q = S = 4, N = 5, D = 3, P = 7."""

    x: torch.Tensor
    y: torch.Tensor
    labels: torch.Tensor
    p: torch.Tensor


@pytest.fixture
def good(device) -> Given:
    make = CaseFactory(torch.float32, device)
    labels = torch.tensor([[0, 1, 2, 3], [4, 0, 0, 1]], device=device)
    return Given(make.randn(2, 4, 3), make.randn(2, 5, 3), labels, make.randn(2, 7))


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request):
    with fm.use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean"])
@pytest.mark.parametrize("shape", [(1, 3, 4, 8), (1, 300, 400, 64)])
def test_distances_of_nearly_equal_points(metric, shape, device):
    t, q, n, d = shape
    make = CaseFactory(torch.float32, device)
    center = 1e3 + make.randn(1, 1, d)
    x, y = center + 1e-3 * make.randn(t, q, d), center + 1e-3 * make.randn(t, n, d)
    exact = (x.double().unsqueeze(2) - y.double().unsqueeze(1)).square().sum(-1)
    exact = exact.sqrt() if metric == "euclidean" else exact
    relative = (fm.pairwise_distance(x, y, metric).double() - exact).abs() / exact
    assert relative.max() < 1e-3


@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean"])
def test_native_distances_are_exact_between_far_clusters(metric, backend, device):
    """Each cluster is narrow, and the mean of all is far from both."""
    make = CaseFactory(torch.float32, device)
    far = torch.tensor([1e3, -1e3], device=device).repeat_interleave(200).view(1, 400, 1)
    x, y = (far + 1e-2 * make.randn(1, 400, 64) for _ in range(2))
    if backend == "torch":  # above its size limit the fallback expands the square, as documented
        x, y = x[:, ::4], y[:, ::4]
    with fm.use_backend("torch"):
        exact = (x.double().unsqueeze(2) - y.double().unsqueeze(1)).square().sum(-1)
    exact = exact.sqrt() if metric == "euclidean" else exact
    relative = (fm.pairwise_distance(x, y, metric).double() - exact).abs() / exact
    assert relative.max() < 1e-5


@pytest.mark.parametrize("metric", METRICS)
def test_equal_points_have_finite_derivatives_of_every_order(metric, device):
    ones = torch.ones(2, 1, 2, 3, dtype=torch.float64, device=device)
    x, y = (points.requires_grad_() for points in ones)
    distance = fm.pairwise_distance(x, y, metric)
    first = torch.autograd.grad(distance.sum(), (x, y), create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), (x, y), allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in (*first, *second))
    if metric == "euclidean":
        assert all((g == 0).all() for g in first)


def test_cosine_of_a_zero_vector(device):
    x = torch.zeros(1, 1, 3, dtype=torch.float64, device=device, requires_grad=True)
    y = torch.ones(1, 1, 3, dtype=torch.float64, device=device)
    distance = fm.pairwise_distance(x, y, "cosine")
    assert distance.item() == 1.0
    (gradient,) = torch.autograd.grad(distance.sum(), x)
    torch.testing.assert_close(gradient, -y / math.sqrt(3) / 1e-8)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("t, q, n, d", [(0, 4, 5, 3), (2, 0, 5, 3), (2, 4, 0, 3), (2, 4, 5, 0)])
def test_pairwise_distance_without_tasks_queries_classes_or_features(metric, t, q, n, d, device):
    make = CaseFactory(torch.float32, device)
    x, y = make.randn(t, q, d).requires_grad_(), make.randn(t, n, d).requires_grad_()
    distance = fm.pairwise_distance(x, y, metric)
    assert distance.shape == (t, q, n)
    assert (distance == (1.0 if metric == "cosine" else 0.0)).all() or d
    for leaf, g in zip((x, y), torch.autograd.grad(distance.sum(), (x, y)), strict=True):
        assert g.shape == leaf.shape
        assert (g == 0).all() or (q and n and d)


@pytest.mark.parametrize("t, q, d", [(0, 4, 3), (2, 0, 3), (2, 4, 0)])
def test_prototype_loss_without_tasks_queries_or_features(t, q, d, device):
    make = CaseFactory(torch.float32, device)
    query, prototypes = make.randn(t, q, d).requires_grad_(), make.randn(t, 5, d).requires_grad_()
    labels = torch.zeros(t, q, dtype=torch.int64, device=device)
    losses = {r: fm.prototype_loss(query, labels, prototypes, reduction=r) for r in ("sum", "none")}
    assert losses["none"].shape == (t, q)
    expected = torch.full((t, q), math.log(5), device=device)
    torch.testing.assert_close(losses["none"], expected)
    torch.testing.assert_close(losses["sum"], expected.sum())
    assert fm.prototype_loss(query, labels, prototypes).isnan() == (t * q == 0)
    for g in torch.autograd.grad(losses["sum"], (query, prototypes)):
        assert (g == 0).all()


def test_one_class_has_zero_loss_and_gradient(good):
    query, prototype = good.x.requires_grad_(), good.y[:, :1].requires_grad_()
    loss = fm.prototype_loss(query, torch.zeros_like(good.labels), prototype)
    assert loss == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, (query, prototype)))


def test_a_gradient_can_be_asked_for_twice_and_changed_without_harm(good):
    query, prototypes = good.x.requires_grad_(), good.y.requires_grad_()
    loss = fm.prototype_loss(query, good.labels, prototypes)
    first = torch.autograd.grad(loss, (query, prototypes), retain_graph=True)
    second = torch.autograd.grad(2 * loss, (query, prototypes), retain_graph=True)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(2 * a, b)
    before = first[0].clone()
    first[0].zero_()
    try:
        (third,) = torch.autograd.grad(loss, query)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        assert torch.equal(third, before)


def test_ties_share_the_probability(device):
    query, prototypes = torch.zeros(1, 1, 2, device=device), torch.eye(2, device=device)[None]
    loss = fm.prototype_loss(query, torch.zeros_like(query[..., 0]).long(), prototypes)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)


def test_far_prototypes_do_not_overflow(device):
    query = torch.tensor([[[0.0]]], device=device, requires_grad=True)
    prototypes = torch.tensor([[[0.0], [1e15]]], device=device, requires_grad=True)
    loss = fm.prototype_loss(query, torch.zeros_like(query[..., 0]).long(), prototypes)
    assert loss == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, (query, prototypes)))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_inf_stay_in_their_rows(value, good):
    x = good.x
    x[0, 1, 2] = value
    x.requires_grad_()
    distance = fm.pairwise_distance(x, good.y)
    assert (distance[0, 1].isnan() if math.isnan(value) else distance[0, 1].isinf()).all()
    loss = fm.prototype_loss(x, good.labels, good.y, reduction="none")
    assert loss[0, 1].isnan()
    others = torch.ones_like(good.labels, dtype=torch.bool)
    others[0, 1] = False
    assert distance[others].isfinite().all() and loss[others].isfinite().all()
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    assert gradient[others].isfinite().all() and gradient[0, 1].isnan().any()


def test_a_class_without_support_has_a_zero_prototype(device):
    x = CaseFactory(torch.float32, device).randn(1, 3, 2).requires_grad_()
    means = fm.prototypes(x, torch.tensor([[0, 0, 2]], device=device), 4)
    assert (means[0, 1] == 0).all() and (means[0, 3] == 0).all()
    torch.testing.assert_close(means[0, 0], x[0, :2].mean(0))
    (gradient,) = torch.autograd.grad(means[0, 1].sum(), x)
    assert (gradient == 0).all()


@pytest.mark.parametrize("t, s, n, d", [(0, 3, 2, 4), (2, 0, 2, 4), (2, 3, 2, 0), (2, 0, 0, 4)])
def test_prototypes_of_nothing(t, s, n, d, device):
    x = CaseFactory(torch.float32, device).randn(t, s, d).requires_grad_()
    means = fm.prototypes(x, torch.zeros(t, s, dtype=torch.int64, device=device), n)
    assert means.shape == (t, n, d) and (means == 0).all()
    assert torch.autograd.grad(means.sum(), x)[0].shape == x.shape


@pytest.mark.parametrize("t, p", [(0, 3), (2, 0)])
def test_inner_update_of_nothing(t, p, device):
    params = torch.empty(t, p, device=device, requires_grad=True)
    lr = torch.tensor(0.5, device=device, requires_grad=True)
    out = fm.inner_update(params, torch.empty_like(params), lr)
    assert out.shape == (t, p)
    assert torch.autograd.grad(out.sum(), lr)[0] == 0


def test_inner_update_of_a_tree(device):
    ones = torch.ones(2, 4, device=device)
    params = {"w": ones[:, :3], "b": [ones[0], ones[0, 0]]}
    lr = {"w": torch.tensor([[1.0], [2.0]], device=device), "b": [0.5, torch.tensor(0.25)]}
    out = fm.inner_update(params, params, lr)
    assert out["w"].tolist() == [[0.0] * 3, [-1.0] * 3]
    assert out["b"][0].tolist() == [0.5] * 4 and out["b"][1].item() == 0.75


def test_half_precision_accumulates_in_float32(device):
    """1,000 ones: a bfloat16 sum would stop at 256."""
    ones = torch.ones(1, 1000, 1, dtype=torch.bfloat16, device=device)
    labels = torch.zeros(1, 1000, dtype=torch.int64, device=device)
    assert fm.prototypes(ones, labels, 1).item() == 1.0
    rows = ones.mT
    assert fm.pairwise_distance(rows, 0 * rows).item() == 1000.0


BAD_INPUT = {
    "list": (lambda g: fm.prototypes([1.0], g.labels, 5), TypeError, "x: expected a tensor, got list"),
    "integers": (lambda g: fm.pairwise_distance(g.labels, g.y), TypeError, "x: expected a floating-point tensor, got torch.int64"),
    "dims": (lambda g: fm.pairwise_distance(g.x[0, 0], g.y), ValueError, "x: expected shape [T, Q, D], got [3]"),
    "tasks": (lambda g: fm.pairwise_distance(g.x[:1], g.y), ValueError, "expected the same T and D, got [1, 4, 3] and [2, 5, 3]"),
    "features": (lambda g: fm.pairwise_distance(g.x, g.y[..., :2]), ValueError, "expected the same T and D"),
    "batched and not": (lambda g: fm.pairwise_distance(g.x, g.y[0]), ValueError, "expected the same T and D"),
    "dtypes": (lambda g: fm.pairwise_distance(g.x, g.y.double()), TypeError, "y: expected dtype torch.float32 like x, got torch.float64"),
    "devices": (lambda g: fm.pairwise_distance(g.x, g.y.to("meta")), ValueError, "y: expected device DEVICE like x, got meta"),
    "metric": (lambda g: fm.pairwise_distance(g.x, g.y, "l2"), ValueError, "metric: expected one of sqeuclidean, euclidean, cosine, dot, got 'l2'"),
    "nearest k": (lambda g: fm.nearest(g.x, g.y, 6), ValueError, "k: expected at most 5, the rows of y, got 6"),
    "nearest no k": (lambda g: fm.nearest(g.x, g.y, 0), ValueError, "k: expected an integer >= 1, got 0"),
    "nearest k type": (lambda g: fm.nearest(g.x, g.y, 1.5), TypeError, "k: expected an integer >= 1, got 1.5 of type float"),
    "nearest of nothing": (lambda g: fm.nearest(g.x, g.y[:, :0]), ValueError, "k: expected at most 0, the rows of y, got 1"),
    "nearest metric": (lambda g: fm.nearest(g.x, g.y, metric="l2"), ValueError, "metric: expected one of"),
    "nearest tasks": (lambda g: fm.nearest(g.x[:1], g.y), ValueError, "expected the same T and D"),
    "nearest present type": (lambda g: fm.nearest(g.x, g.y, present=g.labels), TypeError, "present: expected dtype torch.bool, got torch.int64"),
    "nearest present shape": (lambda g: fm.nearest(g.x, g.y, present=g.labels > 0), ValueError, "present: expected shape [2, 5], got [2, 4]"),
    "label dtype": (lambda g: fm.prototypes(g.x, g.labels.int(), 5), TypeError, "labels: expected dtype torch.int64, got torch.int32"),
    "label shape": (lambda g: fm.prototypes(g.x, g.labels[:, :3], 5), ValueError, "labels: expected shape [2, 4], got [2, 3]"),
    "label device": (lambda g: fm.prototypes(g.x, g.labels.to("meta"), 5), ValueError, "labels: expected device DEVICE, got meta"),
    "label type": (lambda g: fm.prototypes(g.x, [0], 5), TypeError, "labels: expected a tensor, got list"),
    "label high": (lambda g: fm.prototypes(g.x, g.labels, 4), ValueError, "labels[1, 0] is 4, expected 0 <= label < 4"),
    "label negative": (lambda g: fm.prototypes(g.x, g.labels - 2, 5), ValueError, "labels[0, 0] is -2, expected 0 <= label < 5"),
    "num_classes type": (lambda g: fm.prototypes(g.x, g.labels, 5.0), TypeError, "num_classes: expected an integer, got 5.0"),
    "num_classes negative": (lambda g: fm.prototypes(g.x, g.labels, -1), ValueError, "num_classes: expected at least 0, got -1"),
    "loss label": (lambda g: fm.prototype_loss(g.x, g.labels + 2, g.y), ValueError, "query_labels[0, 3] is 5, expected 0 <= label < 5"),
    "loss label unbatched": (lambda g: fm.prototype_loss(g.x[0], g.labels[0] + 2, g.y[0]), ValueError, "is 5, expected 0 <= label < 5"),
    "no class": (lambda g: fm.prototype_loss(g.x, g.labels, g.y[:, :0]), ValueError, "prototypes: expected at least one class, got 0"),
    "reduction": (lambda g: fm.prototype_loss(g.x, g.labels, g.y, reduction="max"), ValueError, "reduction: expected one of mean, sum, none, got 'max'"),
    "grads shape": (lambda g: fm.inner_update(g.p, g.p[:1], 0.1), ValueError, "params and grads: expected one shape, [T, P] or [P], got [2, 7] and [1, 7]"),
    "grads dtype": (lambda g: fm.inner_update(g.p, g.p.double(), 0.1), TypeError, "grads: expected dtype torch.float32 like params"),
    "lr shape": (lambda g: fm.inner_update(g.p, g.p, g.p[0, :3]), ValueError, "lr: expected a number, [P], [T, 1] or [T, P] with T = 2, P = 7, got [1, 3]"),
    "lr dtype": (lambda g: fm.inner_update(g.p, g.p, g.labels), TypeError, "lr: expected a floating-point tensor"),
    "lr device": (lambda g: fm.inner_update(g.p, g.p, g.p.to("meta")), ValueError, "lr: expected device DEVICE like params, got meta"),
    "layer sizes": (lambda g: fm.inner_update(g.p, g.p, g.p[:, 0], layer_sizes=(3, 3)), ValueError, "lr and layer_sizes: expected [2] step sizes and a sum of P = 7, got [2] and 6"),
    "tree": (lambda g: fm.inner_update({"a": g.p}, {"b": g.p}, 0.1), ValueError, "grads: expected the structure of params"),
    "lr tree": (lambda g: fm.inner_update({"a": g.p}, {"a": g.p}, {"b": 0.1}), ValueError, "lr: expected the structure of params"),
    "tree lr shape": (lambda g: fm.inner_update({"a": g.p}, {"a": g.p}, g.p[0, :3]), ValueError, "lr: expected a shape that broadcasts to its parameter's, [2, 7], got [3]"),
    "tree lr dims": (lambda g: fm.inner_update([g.p], [g.p], g.p[None]), ValueError, "lr: expected a shape that broadcasts to its parameter's, [2, 7], got [1, 2, 7]"),
    "tree lr dtype": (lambda g: fm.inner_update([g.p], [g.p], g.labels), TypeError, "lr: expected a floating-point tensor"),
    "tree lr device": (lambda g: fm.inner_update([g.p], [g.p], g.p.to("meta")), ValueError, "lr: expected device DEVICE like params, got meta"),
    "tree grads dtype": (lambda g: fm.inner_update([g.p], [g.p.double()], 0.1), TypeError, "grads: expected dtype torch.float32 like params"),
    "tree layer sizes": (lambda g: fm.inner_update({"a": g.p}, {"a": g.p}, 0.1, layer_sizes=(7,)), ValueError, "layer_sizes: expected None for a tree of params, got (7,)"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_named(name, good):
    call, error, message = BAD_INPUT[name]
    with pytest.raises(error, match=re.escape(message.replace("DEVICE", str(good.x.device)))):
        call(good)


@pytest.mark.rotating
@pytest.mark.parametrize("op", ["pairwise_distance", "inner_update", "prototypes"])
def test_more_than_2_to_the_31_elements(op, backend, device):
    """Each writes or reads a tensor of that many bfloat16 numbers, 4.3 GB, given without copies."""
    if backend == "torch":
        pytest.skip("PyTorch's own indexing is PyTorch's to test")
    if available_memory(device) < 14e9:
        pytest.skip("needs 14 GB of free memory")
    one = torch.ones(1, 1, dtype=torch.bfloat16, device=device)
    if op == "pairwise_distance":
        rows = torch.arange(46350, device=device).view(1, -1, 1).to(torch.bfloat16)
        distance = fm.pairwise_distance(rows, rows, "dot")
        assert distance.numel() > 2**31
        assert (
            distance[0, -1, -1] == -rows[0, -1, 0].square() and distance[0, -1, 1] == -rows[0, -1]
        )
    elif op == "inner_update":
        params = one.expand(32769, 65536)
        lr = torch.linspace(0, 1, 32769, device=device).unsqueeze(1)
        out = fm.inner_update(params, params, lr)
        assert out.numel() > 2**31 and out[0, -1] == 1 and out[-1, -1] == 0
    else:
        x = one.expand(1, 32769, 65536)
        labels = (torch.arange(32769, device=device) == 32768).long().unsqueeze(0)
        assert (fm.prototypes(x, labels, 2) == 1).all()


def available_memory(device: str) -> float:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    with open("/proc/meminfo") as file:
        fields = dict(line.split(":") for line in file)
    return 1024 * float(fields["MemAvailable"].split()[0])
