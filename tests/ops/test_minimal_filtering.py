"""3 x 3 convolutions of many channels, by Winograd's minimal filtering on the CPU."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.func import jvp, vjp

import fastmeta as fm
from tests.helpers.assertions import assert_near

pytestmark = pytest.mark.skipif(
    not fm.build_info()["native"], reason="the native extension was not built"
)
# Examples, channels, outputs, height, width: even and odd images, lines longer than a block of
# tiles, several blocks, and more channels than registers hold at a time.
SHAPES = (
    (9, 16, 32, 12, 12),
    (13, 32, 16, 9, 7),
    (2, 16, 16, 4, 600),
    (40, 16, 48, 13, 14),
    (12, 80, 144, 8, 8),
)


def draw(tasks, b, c, o, h, w, dtype, device):
    generator = torch.Generator(device).manual_seed(b + c + h)
    x = torch.randn(tasks, b, c, h, w, generator=generator, dtype=torch.float64, device=device)
    weight = torch.randn(tasks, o, c, 3, 3, generator=generator, dtype=torch.float64, device=device)
    return x.to(dtype), weight.to(dtype) / (3 * c**0.5)


def loop(x, weight, padding):
    return torch.stack([F.conv2d(*row, padding=padding) for row in zip(x, weight, strict=True)])


def value_and_gradients(function, x, weight, padding):
    """The three maps; upstream gradients are the sine of the value."""
    value, pull = vjp(lambda x, w: function(x, w, padding=padding), x, weight)
    return value, *pull(value.sin())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("padding", [0, 1, 2, 3])
@pytest.mark.parametrize("tasks", [1, 3])  # of one task the threads share the work
def test_it_is_the_convolution(shape, padding, tasks, device):
    x, weight = draw(tasks, *shape, torch.float64, device)
    ours = value_and_gradients(fm.task_conv2d, x, weight, padding)
    for actual, expected in zip(ours, value_and_gradients(loop, x, weight, padding), strict=True):
        assert_near(actual, expected, 1e-13 * x[0, :, 0].numel() ** 0.5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_of_two_pairs(shape, device):
    """A tangent is conv(x_dot, w) + conv(x, w_dot) + what the bias adds."""
    x, weight = draw(2, *shape, torch.float64, device)
    bias = weight[:, :, 0, 0, 0]
    tangents = x.cos(), weight.cos(), bias.cos()

    def plain(x, weight, bias):
        return loop(x, weight, 1) + bias[:, None, :, None, None]

    def ours(x, weight, bias):
        return fm.task_conv2d(x, weight, bias, padding=1)

    results = (jvp(function, (x, weight, bias), tangents) for function in (ours, plain))
    for actual, expected in zip(*results, strict=True):
        assert_near(actual, expected, 1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_loses_no_more_digits_than_plain_sums(shape, device):
    """Of a sum one after the other the rounding grows with its square root, at best."""
    exact = value_and_gradients(loop, *draw(2, *shape, torch.float64, device), 1)
    inputs = draw(2, *shape, torch.float32, device)
    ours = value_and_gradients(fm.task_conv2d, *inputs, 1)
    theirs = value_and_gradients(loop, *inputs, 1)
    for actual, plain, expected in zip(ours, theirs, exact, strict=True):
        own_error, error = ((a - expected).square().mean().sqrt() for a in (actual, plain))
        assert own_error <= 3 * error


@pytest.mark.parametrize("tasks", [1, 2])
def test_the_bits_do_not_depend_on_the_threads(tasks, device):
    x, weight = draw(tasks, 40, 16, 32, 13, 14, torch.float32, device)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(value_and_gradients(fm.task_conv2d, x, weight, 1))
    finally:
        torch.set_num_threads(threads)
    for other, (i, first) in itertools.product(results[1:], enumerate(results[0])):
        assert torch.equal(other[i], first)


def test_nan_reaches_the_blocks_of_outputs_around_it(device):
    """Outputs 2 x 2 whose 4 x 4 pixels have it; a sum of nine products would lose 3 x 3."""
    x, weight = draw(1, 9, 16, 16, 12, 12, torch.float32, device)
    x[0, 3, 5, 6, 6] = float("nan")
    out = fm.task_conv2d(x, weight, padding=1)
    assert out[0, 3, :, 4:8, 4:8].isnan()[:, 1:, 1:].all()
    out[0, 3, :, 4:8, 4:8] = 0
    assert out.isfinite().all()
