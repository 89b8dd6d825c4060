"""Mahalanobis distances and class covariances: against inverses, invariance, edges, derivatives."""

from __future__ import annotations

import re

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import fastmeta as fm
from tests.helpers.cases import CaseFactory

T, Q, N, D = 2, 7, 3, 4


def matrices(make: CaseFactory, *shape: int) -> torch.Tensor:
    root = make.randn(*shape, D, D).double()
    return (root @ root.mT + 0.5 * torch.eye(D, device=root.device)).to(make.dtype)


@pytest.fixture(params=["a class", "a task"])
def given(request, device):
    make = CaseFactory(torch.float64, device)
    shape = (T, N) if request.param == "a class" else (T,)
    return make.randn(T, Q, D), make.randn(T, N, D), matrices(make, *shape)


def per_class(covariance: torch.Tensor) -> torch.Tensor:
    return covariance if covariance.dim() == 4 else covariance.unsqueeze(1).expand(-1, N, -1, -1)


def by_inverse(x, y, covariance):
    z = x.unsqueeze(2) - y.unsqueeze(1)
    return torch.einsum("tqnd,tnde,tqne->tqn", z, per_class(covariance).inverse(), z)


def test_equals_the_explicit_inverse(given):
    torch.testing.assert_close(fm.mahalanobis_distance(*given), by_inverse(*given))
    one = fm.mahalanobis_distance(*(z[0] for z in given))
    torch.testing.assert_close(one, by_inverse(*given)[0])


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_other_dtypes(given, dtype, tolerance):
    x, y, covariance = given
    rounded = x.to(dtype), y.to(dtype), covariance.float()
    distance = fm.mahalanobis_distance(*rounded)
    exact = by_inverse(*(z.double() for z in rounded))
    assert distance.dtype == dtype
    torch.testing.assert_close(distance.double(), exact, rtol=tolerance, atol=tolerance)


def test_identities_give_the_squared_euclidean_distance(given):
    x, y, covariance = given
    identity = torch.eye(D, dtype=x.dtype, device=x.device).expand(covariance.shape)
    expected = fm.pairwise_distance(x, y)
    torch.testing.assert_close(fm.mahalanobis_distance(x, y, identity), expected)


def test_affine_maps_change_nothing(given):
    x, y, covariance = given
    make = CaseFactory(x.dtype, x.device.type, seed=1)
    matrix, offset = make.randn(D, D) + 2 * torch.eye(D, device=x.device), make.randn(D)
    mapped = x @ matrix.mT + offset, y @ matrix.mT + offset, matrix @ covariance @ matrix.mT
    expected = fm.mahalanobis_distance(x, y, covariance)
    torch.testing.assert_close(fm.mahalanobis_distance(*mapped), expected)


def test_a_common_offset_costs_no_digits(given):
    x, y, covariance = (z.float() for z in given)
    far = x + 4096, y + 4096
    exact = by_inverse(*(z.double() for z in (*far, covariance)))
    distance = fm.mahalanobis_distance(*far, covariance).double()
    torch.testing.assert_close(distance, exact, rtol=1e-4, atol=0)


def test_derivatives(given):
    def distance(x, y, root):
        return fm.mahalanobis_distance(x, y, root @ root.mT)

    x, y, covariance = given
    inputs = (x[:, :2], y, torch.linalg.cholesky(covariance))
    inputs = tuple(z.clone().requires_grad_() for z in inputs)
    assert gradcheck(distance, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(distance, inputs, check_fwd_over_rev=True)


def test_vmap_and_compile(given):
    samples = [torch.stack([z, 2 * z]) for z in given]
    loop = torch.stack([fm.mahalanobis_distance(*one) for one in zip(*samples, strict=True)])
    torch.testing.assert_close(torch.func.vmap(fm.mahalanobis_distance)(*samples), loop)
    compiled = torch.compile(fm.mahalanobis_distance, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given), loop[0])


@pytest.mark.parametrize("t, q, n", [(0, 3, 2), (2, 0, 2), (2, 3, 0)])
def test_nothing(t, q, n, device):
    make = CaseFactory(torch.float32, device)
    for covariance in (matrices(make, t, n), matrices(make, t)):
        x, y = make.randn(t, q, D), make.randn(t, n, D)
        assert fm.mahalanobis_distance(x, y, covariance).shape == (t, q, n)


def test_a_matrix_that_is_not_positive_definite(given):
    x, y, covariance = given
    covariance[1] = -covariance[1]
    place = "[1, 0]" if covariance.dim() == 4 else "[1]"
    with pytest.raises(ValueError, match=re.escape(f"covariance{place}: expected a symmetric pos")):
        fm.mahalanobis_distance(x, y, covariance)
    unreadable = torch.func.vmap(fm.mahalanobis_distance)(*(z[None] for z in (x, y, covariance)))
    assert unreadable[0, 1].isnan().all() and unreadable[0, 0].isfinite().all()


def test_bad_covariances(device):
    make = CaseFactory(torch.float32, device)
    x, y, good = make.randn(T, Q, D), make.randn(T, N, D), matrices(make, T, N)
    bad = {
        "expected shape [2, 3, 4, 4] or [2, 4, 4], got [2, 2, 4, 4]": good[:, :2],
        "expected dtype torch.float32 like x, got torch.float64": good.double(),
        "expected a floating-point tensor, got torch.int64": good.long(),
        f"expected device {x.device} like x, got meta": good.to("meta"),
    }
    for message, covariance in bad.items():
        with pytest.raises((ValueError, TypeError), match=re.escape(f"covariance: {message}")):
            fm.mahalanobis_distance(x, y, covariance)


def by_loop(x, labels, n, ridge=1.0, most=1.0):
    """The formula, class by class, with torch.cov."""

    def covariance(rows):
        return torch.cov(rows.mT) if len(rows) > 1 else torch.zeros(D, D).to(rows)

    out = []
    for rows, own in zip(x, labels, strict=True):
        task = covariance(rows[own >= 0])
        for i in range(n):
            k = int((own == i).sum())
            share = min(k / (k + 1), most)
            mixed = share * covariance(rows[own == i]) + (1 - share) * task
            out.append(mixed + ridge * torch.eye(D).to(x))
    return torch.stack(out).unflatten(0, (len(x), n))


# A class of four, of one, of none; absent examples; a task of one example.
LABELS = [[0, 0, 1, 0, -1, 0, 3, 3], [-1, -1, -1, 2, -1, -1, -1, -1]]


@pytest.mark.parametrize("ridge, most", [(1.0, 1.0), (0.1, 0.1), (0.0, 0.0)])
def test_covariances_equal_a_loop(ridge, most, device):
    make = CaseFactory(torch.float64, device)
    x, labels = make.randn(2, 8, D), torch.tensor(LABELS, device=device)
    covariances = fm.class_covariances(x, labels, 4, ridge, most)
    torch.testing.assert_close(covariances, by_loop(x, labels, 4, ridge, most))
    torch.testing.assert_close(
        fm.class_covariances(x[0], labels[0], 4, ridge, most), covariances[0]
    )


def test_absent_examples_are_not_read_and_one_shot_has_a_distance(device):
    make = CaseFactory(torch.float64, device)
    x, labels = make.randn(2, 8, D), torch.tensor(LABELS, device=device)
    expected = fm.class_covariances(x, labels, 4)
    x[labels == -1] = torch.nan
    x.requires_grad_()
    covariances = fm.class_covariances(x, labels, 4)
    assert torch.equal(covariances, expected)
    distance = fm.mahalanobis_distance(make.randn(2, Q, D), make.randn(2, 4, D), covariances)
    assert (distance > 0).all()
    (gradient,) = torch.autograd.grad(distance.sum(), x)
    assert gradient.isfinite().all() and (gradient[labels == -1] == 0).all()


def test_covariances_of_half_types_are_wide(device):
    make = CaseFactory(torch.bfloat16, device)
    x, labels = make.randn(2, 8, D), torch.tensor(LABELS, device=device)
    covariances = fm.class_covariances(x, labels, 4)
    assert covariances.dtype == torch.float32
    exact = by_loop(x.double(), labels, 4)
    torch.testing.assert_close(covariances.double(), exact, rtol=1e-5, atol=1e-5)


def test_covariances_under_transforms(device):
    make = CaseFactory(torch.float64, device)
    x, labels = make.randn(2, 8, 2).requires_grad_(), torch.tensor(LABELS, device=device)

    def covariances(x):
        return fm.class_covariances(x, labels, 4)

    assert gradcheck(covariances, (x,), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(covariances, (x,))
    samples = torch.stack([x, 2 * x]).detach()
    loop = torch.stack([covariances(one) for one in samples])
    torch.testing.assert_close(torch.func.vmap(covariances)(samples), loop)
    compiled = torch.compile(covariances, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), covariances(x))


def test_bad_options_of_covariances(device):
    x, labels = torch.zeros(2, 8, D, device=device), torch.zeros(2, 8, dtype=torch.int64)
    labels = labels.to(device)
    for message, call in {
        "ridge: expected at least 0, got -1": lambda: fm.class_covariances(x, labels, 4, -1),
        "max_share: expected at most 1, got 2": lambda: fm.class_covariances(x, labels, 4, 1, 2),
        "labels[0, 0] is 4, expected 0": lambda: fm.class_covariances(x, labels + 4, 4),
        "labels: expected shape [2, 8]": lambda: fm.class_covariances(x, labels[:, :3], 4),
    }.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            call()
