"""Batch norm of all pairs of maps: against torch's on the pairs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from fastmeta.models._pair_norm import normalize_pairs
from tests.helpers.assertions import assert_near

SHAPES = [(2, 7, 3, 4, 5, 5), (1, 1, 1, 2, 2, 3), (3, 1, 6, 2, 1, 1), (1, 5, 1, 3, 2, 2)]


def maps(shape, dtype=torch.float64):
    """Halves [T, Q, C, H, W] and [T, N, C, H, W]; each task has its own mean."""
    tasks, queries, classes, *rest = shape
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    base = draw(tasks, 1, *rest)
    return tuple((base + 3 + draw(tasks, n, *rest)).to(dtype) for n in (queries, classes))


def norm_of(channels, dtype=torch.float64, **options):
    norm = nn.BatchNorm2d(channels, dtype=dtype, **options)
    if norm.affine:
        with torch.no_grad():
            norm.weight.copy_(torch.linspace(-1, 2, channels))
            norm.bias.copy_(torch.linspace(1, 3, channels))
    return norm


def by_pairs(a, b, norm):
    """The definition: the norm of all sums, as one batch."""
    pairs = a.unsqueeze(2) + b.unsqueeze(1)
    return norm(pairs.flatten(0, 2)).view(pairs.shape)


def sums(a, b, norm):
    x, y = normalize_pairs(a, b, norm)
    return x.unsqueeze(2) + y.unsqueeze(1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": None},
        {"momentum": 1.0, "eps": 0.1},
        {"affine": False},
        {"track_running_stats": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_torchs_batch_norm_of_all_pairs(shape, options):
    a, b = (half.requires_grad_() for half in maps(shape))
    ours, theirs = (norm_of(shape[3], **options) for _ in range(2))
    for factor in (1.0, 0.5):  # twice, as the average of all batches changes its share
        out, expected = sums(factor * a, b, ours), by_pairs(factor * a, b, theirs)
        assert_near(out, expected, 1e-13)
        upstream = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
        grads, exact = (
            torch.autograd.grad(y, [a, b, *norm.parameters()], upstream)
            for y, norm in ((out, ours), (expected, theirs))
        )
        for g, e in zip(grads, exact, strict=True):
            assert_near(g, e, 1e-12)
    for name, buffer in ours.named_buffers():
        assert_near(buffer, theirs.get_buffer(name), 1e-14)
    ours.eval(), theirs.eval()
    assert_near(sums(a, b, ours), by_pairs(a, b, theirs), 1e-13)
    for name, buffer in ours.named_buffers():  # which evaluation leaves
        assert_near(buffer, theirs.get_buffer(name), 1e-14)


def test_halves_that_cancel_keep_their_digits():
    """The published form of the variance is negative here, and its root is NaN."""
    a = torch.linspace(-1000, 1000, 50, dtype=torch.float64).view(1, 1, 2, 5, 5)
    b = -a + 0.01 * a.cos()
    exact = by_pairs(a, b, norm_of(2, eps=1e-12))
    out = sums(a.float(), b.float(), norm_of(2, torch.float32, eps=1e-12))
    rounded = by_pairs(a.float().double(), b.float().double(), norm_of(2, eps=1e-12))
    assert_near(rounded, exact, 0.1)  # the inputs' own rounding, 3e-5 of deviations of 0.007
    # Each half is as large as 1000 / 0.007, and so is rounded to 0.01.
    assert_near(out, rounded, 0.02)


def test_derivatives_match_finite_differences():
    a, b = (half.requires_grad_() for half in maps((2, 2, 1, 1, 2, 1)))
    norm = norm_of(1, track_running_stats=False)
    weight, bias = norm.weight, norm.bias

    def function(a, b, weight, bias):
        replaced = copy.copy(norm)
        replaced._parameters = {"weight": weight, "bias": bias}
        return normalize_pairs(a, b, replaced)

    assert gradcheck(function, (a, b, weight, bias), check_forward_ad=True)
    assert gradgradcheck(function, (a, b, weight, bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_summed_in_float32(dtype):
    a, b = maps((2, 40, 20, 4, 5, 5), dtype)
    norm = norm_of(4, torch.float32)
    x, y = normalize_pairs(a, b, norm)
    exact = norm_of(4, torch.float32)
    expected = normalize_pairs(a.float(), b.float(), exact)
    assert x.dtype == y.dtype == dtype
    assert torch.equal(x, expected[0].to(dtype)) and torch.equal(y, expected[1].to(dtype))
    assert torch.equal(norm.running_var, exact.running_var)


def test_autocast_changes_nothing():
    a, b = maps((2, 3, 2, 4, 5, 5), torch.float32)
    expected = normalize_pairs(a, b, norm_of(4, torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        actual = normalize_pairs(a, b, norm_of(4, torch.float32))
    for x, e in zip(actual, expected, strict=True):
        assert torch.equal(x, e)


@pytest.mark.parametrize(
    "a, b, message",
    [
        ((2, 3, 4, 5), (2, 3, 4, 5), r"a: expected maps \[T, Q, C, H, W\] with 4 channels"),
        ((2, 3, 4, 5, 5), (2, 3, 3, 5, 5), "b: expected maps"),
        ((2, 3, 4, 5, 5), (1, 3, 4, 5, 5), "expected the same T, C, H and W"),
        ((2, 3, 4, 5, 5), (2, 3, 4, 5, 4), "expected the same T, C, H and W"),
        ((1, 1, 4, 1, 1), (1, 1, 4, 1, 1), "more than one number a channel"),
        ((2, 0, 4, 5, 5), (2, 3, 4, 5, 5), "more than one number a channel"),
    ],
)
def test_bad_arguments_are_refused(a, b, message):
    with pytest.raises(ValueError, match=message):
        normalize_pairs(torch.zeros(a), torch.zeros(b), nn.BatchNorm2d(4))
