"""Which rows are nearest: ties, near ties, NaN, absent rows, and the memory it takes."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastmeta as fm
from tests.helpers.assertions import each_backend, require_kernels
from tests.helpers.case import DTYPES, METRICS, CaseFactory

each_size = pytest.mark.parametrize("n", [5, 200], ids=["few", "many"])


def sorted_first(x, y, k, metric="sqeuclidean"):
    """Indices of a stable sort of all distances."""
    return fm.pairwise_distance(x, y, metric).sort(dim=-1, stable=True).indices[..., :k]


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
@each_backend
@each_size
def test_neighbours_are_those_of_a_stable_sort(n, backend, metric, dtype, k, device):
    make = CaseFactory(dtype, device)
    x, y = make.randn(2, 50, 24), make.randn(2, n, 24)
    with fm.use_backend("torch"):
        expected = sorted_first(x.double(), y.double(), k, metric)
    with fm.use_backend(backend):
        distances, indices = fm.nearest(x, y, k, metric)
    assert indices.dtype == torch.int64 and not indices.requires_grad
    assert torch.equal(indices, expected)
    assert (distances.diff(dim=-1) >= 0).all()


@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean", "dot"])
@each_backend
@each_size
def test_equal_distances_keep_their_order(n, backend, metric, device):
    """On a coarse grid of whole numbers most distances are equal, and every sum is exact."""
    make = CaseFactory(torch.float32, device)
    x, y = make.labels(3, 2, 60, 8).float(), make.labels(3, 2, n, 8).float()
    with fm.use_backend(backend):
        for k in (1, 3):
            assert torch.equal(fm.nearest(x, y, k, metric)[1], sorted_first(x, y, k, metric))


@each_backend
@each_size
def test_copies_of_one_row_are_taken_in_order(n, backend, device):
    make = CaseFactory(torch.float32, device)
    x, y = 100 + make.randn(1, 40, 24), 100 + make.randn(1, 1, 24).expand(1, n, 24)
    with fm.use_backend(backend):
        for k in (1, 4):
            assert (fm.nearest(x, y, k)[1] == torch.arange(k, device=device)).all()


@pytest.mark.parametrize("spread", [1e-2, 1e-4])
@each_size
def test_nearly_equal_rows_far_from_the_origin(n, spread, device):
    """Products lose all digits here; the rows of two clusters are far from their mean as well."""
    require_kernels(device)
    make = CaseFactory(torch.float32, device)
    far = torch.tensor([1e3, -1e3], device=device).view(1, 2, 1)
    x = far.repeat(1, 30, 1) + spread * make.randn(1, 60, 40)
    y = far.repeat(1, n, 1) + spread * make.randn(1, 2 * n, 40)
    exact = (x.double().unsqueeze(2) - y.double().unsqueeze(1)).square().sum(-1)
    distances, indices = fm.nearest(x, y, 3)
    torch.testing.assert_close(distances.double(), exact.gather(2, indices), rtol=1e-5, atol=0)
    torch.testing.assert_close(distances.double(), exact.sort().values[..., :3], rtol=1e-5, atol=0)


@each_backend
@each_size
def test_nan_is_farther_than_every_number(n, backend, device):
    make = CaseFactory(torch.float32, device)
    x, y = make.randn(1, 40, 12), make.randn(1, n, 12)
    expected = fm.nearest(x, y[:, 2:], 2)
    x[0, 1, 3] = math.nan
    y[0, :2] = math.nan
    with fm.use_backend(backend):
        distances, indices = fm.nearest(x, y, 2)
        assert distances[0, 1].isnan().all() and indices[0, 1].tolist() == [0, 1]
        others = torch.arange(40, device=device) != 1
        assert torch.equal(indices[:, others], expected[1][:, others] + 2)
        every = fm.nearest(x, y, n)
        assert every[0][0, 5, -2:].isnan().all() and every[1][0, 5, -2:].tolist() == [0, 1]


@pytest.mark.parametrize("metric", METRICS)
@each_backend
@each_size
def test_infinite_and_huge_numbers(n, backend, metric, device):
    """Neighbours are the first of a stable sort, whatever overflows."""
    make = CaseFactory(torch.float32, device)
    x, y = make.randn(1, 40, 12), make.randn(1, n, 12)
    y[0, 1], y[0, 2, 3], y[0, 3, 4] = 2e19, math.inf, -math.inf
    x[0, 0], x[0, 1, 3], x[0, 2], x[0, 3] = 2e19, math.inf, 1e30, 1.9e19
    with fm.use_backend(backend):
        distances, indices = fm.nearest(x, y, 3, metric)
        everything = fm.pairwise_distance(x, y, metric)
    # Products of 2e19 cancel in some sums.
    close = {"rtol": 1e-4, "atol": 1e-5, "equal_nan": True}
    chosen = everything.gather(2, indices)
    torch.testing.assert_close(distances, chosen, **close)
    sorted_ones = everything.sort(dim=2, stable=True).values[..., :3]
    torch.testing.assert_close(distances, sorted_ones, **close)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e30, 0.0])
@pytest.mark.parametrize("metric", METRICS)
@each_backend
@each_size
def test_absent_rows_are_not_read(n, backend, metric, garbage, device):
    make = CaseFactory(torch.float64, device)
    x, y = make.randn(3, 40, 12).requires_grad_(), make.randn(3, n, 12)
    present = make.labels(3, 3, n) > 0
    present[0, :2], present[1], present[2, 0] = True, False, True
    present[1, 3] = True  # one row only
    y = y.masked_fill(~present.unsqueeze(2), garbage).requires_grad_()
    with fm.use_backend(backend):
        distances, indices = fm.nearest(x, y, 2, metric, present)
        finite = indices >= 0
        gradients = torch.autograd.grad(distances[finite].square().sum(), (x, y))
        direction = torch.ones_like(x), torch.ones_like(y)
        tangent = torch.func.jvp(
            lambda *rows: fm.nearest(*rows, 2, metric, present)[0], (x, y), direction
        )[1]
    for t in range(3):
        (places,) = present[t].nonzero(as_tuple=True)
        own = y[t, places]
        value, index = fm.nearest(x[t], own, min(2, len(own)), metric)
        torch.testing.assert_close(distances[t, :, : len(own)], value)
        assert torch.equal(indices[t, :, : len(own)], places[index])
    assert (indices[1, :, 1] == -1).all() and distances[1, :, 1].isinf().all()
    assert all(g.isfinite().all() for g in gradients) and tangent.isfinite().all()
    assert (gradients[1][~present] == 0).all() and (tangent[1, :, 1] == 0).all()


@each_backend
def test_no_query_no_task_no_feature(backend, device):
    make = CaseFactory(torch.float32, device)
    with fm.use_backend(backend):
        for t, q, d in ((0, 4, 3), (2, 0, 3), (2, 4, 0)):
            distances, indices = fm.nearest(make.randn(t, q, d), make.randn(t, 5, d), 2)
            assert distances.shape == indices.shape == (t, q, 2)
            assert (distances == 0).all()
            assert (indices == torch.arange(2, device=device)).all()


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    metric=st.sampled_from(METRICS),
    sizes=st.tuples(*(st.integers(1, n) for n in (3, 150, 150, 70))),
    share=st.floats(0, 1),
    absent=st.booleans(),
)
def test_any_shape(device, metric, sizes, share, absent):
    t, q, n, d = sizes
    k = 1 + int(share * (n - 1))
    make = CaseFactory(torch.float64, device)
    present = make.labels(4, t, n) > 0 if absent else None
    args = make.randn(t, q, d), make.randn(t, n, d), k, metric, present
    with fm.use_backend("torch"):
        expected = fm.nearest(*args)
    actual = fm.nearest(*args)
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-9, atol=1e-12)
    if d > 1:  # with one feature cosines are equal but for rounding
        assert torch.equal(actual[1], expected[1])


GROWTH = """
import re, torch, fastmeta as fm
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
x, y = torch.randn(1, 20_000, 8), torch.randn(1, 4_000, 8)
fm.nearest(x[:, :100], y, 2)
before = peak()
fm.nearest(x, y, 2)
print(peak() - before)
"""


def test_the_matrix_is_never_whole():
    require_kernels("cpu")
    output = subprocess.run(
        [sys.executable, "-c", GROWTH], check=True, capture_output=True, text=True
    )
    assert 0 < int(output.stdout) < 4 * 20_000 * 4_000 / 20


def test_opcheck(device):
    require_kernels(device)
    make = CaseFactory(torch.float32, device)
    present = make.labels(3, 2, 5) > 0
    for mask in (None, present):
        arguments = make.randn(2, 4, 3), make.randn(2, 5, 3), mask, 2, "cosine"
        results = torch.library.opcheck(torch.ops.fastmeta.nearest.default, arguments)
        assert set(results.values()) == {"SUCCESS"}


def test_indices_under_vmap(device):
    make = CaseFactory(torch.float64, device)
    x, y, present = make.randn(3, 2, 9, 4), make.randn(2, 6, 4), make.labels(3, 3, 2, 6) > 0

    def indices(x, present):
        return fm.nearest(x, y, 2, present=present)[1]

    loop = torch.stack([indices(*one) for one in zip(x, present, strict=True)])
    assert torch.equal(torch.func.vmap(indices)(x, present), loop)
