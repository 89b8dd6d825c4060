"""Pooled sums of all pairs: against max_pool2d, ties, edges, errors, and the raw kernels."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F

import fastmeta as fm
from tests.helpers.assertions import each_backend
from tests.helpers.case import CaseFactory
from tests.helpers.skips import needs_kernels

SIZES = [((5, 5), 2), ((4, 6), 2), ((7, 3), 3), ((3, 4), 1), ((16, 15), 15)]
each_size = pytest.mark.parametrize("size, pool", SIZES, ids=str)
OPS = torch.ops.fastmeta


def by_torch(x, y, pool):
    """The definition: max_pool2d of relu of the sums, as one batch."""
    pairs = F.relu(x.unsqueeze(2) + y.unsqueeze(1))
    pooled = F.max_pool2d(pairs.flatten(0, 2), pool)
    return pooled.view(*pairs.shape[:4], *pooled.shape[2:])


def maps(size, dtype=torch.float64, device="cpu", t=2, q=3, n=4, c=5):
    make = CaseFactory(dtype, device)
    return make.randn(t, q, c, *size), make.randn(t, n, c, *size)


def integers(x):
    """Few different numbers, so that most windows have equal maxima, and many have none above 0."""
    return (2 * x).round().clamp(-2, 1)


@each_backend
@each_size
@pytest.mark.parametrize("rounded", [lambda x: x, integers], ids=["distinct", "ties"])
def test_it_is_torchs_pooling_of_all_pairs_to_the_second_derivative(
    rounded, size, pool, backend, device
):
    leaves = [rounded(z).requires_grad_() for z in maps(size, device=device)]
    upstream = torch.randn_like(by_torch(*leaves, pool)).requires_grad_()

    def values(function):
        out = function(*leaves, pool)
        grads = torch.autograd.grad(out, leaves, upstream, create_graph=True)
        second = torch.autograd.grad(sum(g.sin().sum() for g in grads), upstream)
        return out, *grads, *second

    with fm.use_backend(backend):
        ours = values(fm.pair_pool)
    expected = values(by_torch)
    assert torch.equal(ours[0], expected[0])
    for g, e in zip(ours, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-13, atol=1e-13)


@each_backend
def test_nothing_above_zero_has_no_gradient(backend, device):
    x = torch.zeros(1, 2, 1, 2, 2, device=device, requires_grad=True)
    y = torch.tensor([[0.0, -1.0], [0.0, -2.0]], device=device).expand(1, 3, 1, 2, 2).clone()
    y.requires_grad_()
    with fm.use_backend(backend):
        out = fm.pair_pool(x, y)
        grads = torch.autograd.grad(out.sum(), (x, y))
    assert (out == 0).all() and (grads[0] == 0).all() and (grads[1] == 0).all()


@each_backend
def test_a_number_that_is_not_finite_stays_in_its_window(backend, device):
    x, y = maps((4, 4), torch.float32, device)
    x[0, 1, 2, 1, 1], x[0, 1, 2, 3, 3], y[1, 2, 3, 0, 2] = torch.nan, torch.inf, -torch.inf
    with fm.use_backend(backend):
        out = fm.pair_pool(x, y)
    torch.testing.assert_close(out, by_torch(x, y, 2), equal_nan=True)
    assert out[0, 1, :, 2, 0, 0].isnan().all() and out.isnan().sum() == 4


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_are_computed_in_float32(dtype, backend, device):
    """One rounding of each result: also of a gradient that many pairs share."""
    leaves = [z.requires_grad_() for z in maps((5, 5), dtype, device, q=20, n=30)]
    wide = [z.detach().float().requires_grad_() for z in leaves]
    with fm.use_backend(backend):
        out, exact = (fm.pair_pool(*z) for z in (leaves, wide))
        upstream = torch.randn_like(out)
        grads = torch.autograd.grad(out, leaves, upstream)
        expected = torch.autograd.grad(exact, wide, upstream.float())
    assert torch.equal(out, exact.to(dtype))
    for g, e in zip(grads, expected, strict=True):
        torch.testing.assert_close(g, e.to(dtype))


@each_backend
@pytest.mark.parametrize("empty", ["t", "q", "n", "c"])
def test_sizes_of_zero(empty, backend, device):
    sizes = {"t": 2, "q": 3, "n": 4, "c": 5, empty: 0}
    leaves = [z.requires_grad_() for z in maps((5, 4), torch.float32, device, **sizes)]
    with fm.use_backend(backend):
        out = fm.pair_pool(*leaves)
        grads = torch.autograd.grad(out.sum(), leaves)
    assert out.shape == (*sizes.values(), 2, 2)
    for leaf, g in zip(leaves, grads, strict=True):
        assert g.shape == leaf.shape and (g == 0).all()


@needs_kernels
@pytest.mark.parametrize("suffix", ["", "_backward", "_gather"])
def test_opcheck(suffix, device):
    x, y = maps((5, 4), torch.float32, device)
    pooled, place = OPS.pair_pool(x, y, 2)
    args = {
        "": (x, y, 2),
        "_backward": (pooled, place, [5, 4], 2),
        "_gather": (x, y, place, 2),
    }[suffix]
    op = getattr(OPS, f"pair_pool{suffix}").default
    assert set(torch.library.opcheck(op, args).values()) == {"SUCCESS"}


@needs_kernels
def test_the_raw_ops_refuse_what_they_would_read_out_of_bounds(device):
    x, y = maps((5, 4), torch.float32, device)
    pooled, place = OPS.pair_pool(x, y, 2)
    for call in (
        lambda: OPS.pair_pool(x[0], y, 2),
        lambda: OPS.pair_pool(x, y[:1], 2),
        lambda: OPS.pair_pool(x, y[..., :3], 2),
        lambda: OPS.pair_pool(x, y.double(), 2),
        lambda: OPS.pair_pool(x, y, 0),
        lambda: OPS.pair_pool(x, y, 5),
        lambda: OPS.pair_pool(x.long(), y.long(), 2),
        lambda: OPS.pair_pool_gather(x, y, place[:1], 2),
        lambda: OPS.pair_pool_gather(x, y, place.long(), 2),
        lambda: OPS.pair_pool_backward(pooled, place[..., :1], [5, 4], 2),
        lambda: OPS.pair_pool_backward(pooled, place, [6, 4], 2),
        lambda: OPS.pair_pool_backward(pooled, place, [5, 4], 3),
        lambda: OPS.pair_pool_backward(pooled[0], place[0], [5, 4], 2),
    ):
        with pytest.raises((RuntimeError, TypeError)):
            call()


@needs_kernels
@pytest.mark.parametrize("place", [4, 200, 254, 255])
def test_a_place_outside_of_the_window_reads_nothing(place, device):
    x, y = maps((5, 4), torch.float32, device)
    pooled, places = OPS.pair_pool(x, y, 2)
    places.fill_(place)
    assert (OPS.pair_pool_gather(x, y, places, 2) == 0).all()
    for grad in OPS.pair_pool_backward(pooled, places, [5, 4], 2):
        assert (grad == 0).all()


ERRORS = {
    "x": (lambda x, y: (1.0, y), TypeError, "x: expected a tensor, got float"),
    "y int": (
        lambda x, y: (x, y.long()),
        TypeError,
        "y: expected a floating-point tensor, got torch.int64",
    ),
    "x dims": (
        lambda x, y: (x[0, 0], y),
        ValueError,
        "x: expected shape [T, Q, C, H, W], got [5, 5, 4]",
    ),
    "channels": (
        lambda x, y: (x, y[:, :, :2]),
        ValueError,
        "expected the same T, C, H and W, got [2, 3, 5, 5, 4] and [2, 4, 2, 5, 4]",
    ),
    "tasks": (lambda x, y: (x, y[0]), ValueError, "expected the same T, C, H and W"),
    "dtype": (
        lambda x, y: (x, y.double()),
        TypeError,
        "y: expected dtype torch.float32 like x, got torch.float64",
    ),
    "pool float": (lambda x, y: (x, y, 2.0), TypeError, "pool: expected an integer, got 2.0"),
    "pool 0": (lambda x, y: (x, y, 0), ValueError, "pool: expected at least 1, got 0"),
    "pool 16": (lambda x, y: (x, y, 16), ValueError, "pool: expected at most 15, got 16"),
    "small maps": (
        lambda x, y: (x, y, 5),
        ValueError,
        "pool: expected at most the maps' height and width, got 5 for maps [5, 4]",
    ),
}


@each_backend
@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument(name, backend, device):
    arguments, kind, message = ERRORS[name]
    given = arguments(*maps((5, 4), torch.float32, device))
    with fm.use_backend(backend), pytest.raises(kind, match=re.escape(message)):
        fm.pair_pool(*given)
