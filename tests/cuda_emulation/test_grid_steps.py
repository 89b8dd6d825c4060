"""Steps over images, and convolutions of several operands, as the grid executor launches them."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from tests.cuda_emulation import emulator
from tests.cuda_emulation.build import BUILD
from tests.cuda_emulation.checks import MAPS, SHAPES, TOLERANCE, Shape, assert_near

DTYPES = [torch.float32, torch.float64]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

# [B, H, W, C]; one channel, few, a part of a block's, several blocks' of them
IMAGES = [(3, 5, 7, 1), (4, 3, 5, 3), (2, 9, 6, 20), (5, 1, 4, 70), (1, 40, 25, 8)]


@pytest.fixture(scope="module")
def steps() -> ctypes.CDLL:
    library = emulator.load_kernels(BUILD / "kernels.so")
    library.part_numbers.restype = ctypes.c_int64
    return library


def pointer(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def numbers(*values: int) -> ctypes.Array:
    return (ctypes.c_int64 * len(values))(*values)


def run_image_step(steps, name: str, x: Tensor, whole_batch: bool, target: Tensor) -> Tensor:
    parts = torch.empty(steps.part_numbers(), dtype=x.dtype)
    tasks, *images = x.shape
    error = steps.run_image_step(
        *(name.encode(), x.dtype == torch.float32, ctypes.c_int64(tasks), numbers(*images)),
        *(whole_batch, pointer(x), pointer(target), pointer(parts)),
    )
    assert error == 0, emulator.report()
    return target


def codes(x: Tensor) -> Tensor:
    """What grid_steps.cu makes of a position, [B, H, W, 1]."""
    image, h, w = (torch.arange(size, dtype=torch.float64) for size in x.shape[1:4])
    return (image[:, None, None] + 10 * h[:, None] + 100 * w).unsqueeze(-1)


def of_channels(steps, name: str, x: Tensor, whole_batch: bool) -> Tensor:
    """Two numbers of each channel, [T, 1 or B, 2, C]; what lies behind them is left alone."""
    tasks, count, *_, channels = x.shape
    target = torch.full((tasks, 1 if whole_batch else count, 4, channels), -7, dtype=x.dtype)
    run_image_step(steps, name, x, whole_batch, target)
    assert (target[:, :, 2:] == -7).all()
    return target[:, :, :2]


def sets_of(x: Tensor, whole_batch: bool) -> Tensor:
    """[T, sets, positions, C]"""
    return x.flatten(1, 3).unsqueeze(1) if whole_batch else x.flatten(2, 3)


each_images = pytest.mark.parametrize("images", IMAGES, ids=str)
each_set = pytest.mark.parametrize("whole_batch", [True, False], ids=["batch", "image"])
# With many multiprocessors, sets are split.
each_device = pytest.mark.parametrize("multiprocessors", [1, 99])


@each_dtype
@each_images
def test_a_table_has_each_element_once(steps, images, dtype):
    x = torch.randn(2, *images, dtype=dtype)
    actual = run_image_step(steps, "table", x, True, torch.full_like(x, -7))
    assert torch.equal(actual, x + codes(x).to(dtype))


@each_dtype
@each_device
@each_set
@each_images
def test_column_sums_are_of_their_positions(steps, images, whole_batch, multiprocessors, dtype):
    x = torch.randn(2, *images, dtype=dtype)
    with emulator.multiprocessors(multiprocessors):
        actual = of_channels(steps, "column_sums", x, whole_batch)
    both = [sets_of(y, whole_batch).sum(2) for y in (x.double(), x.double() * codes(x))]
    scale = sets_of(x.double().abs() * (1 + codes(x)), whole_batch).sum(2).unsqueeze(2)
    error = (actual - torch.stack(both, 2)).abs() / scale
    assert error.max() < (1e-6 if dtype == torch.float32 else 1e-14)


@each_dtype
@each_device
@each_set
@each_images
def test_column_moments_keep_their_digits(steps, images, whole_batch, multiprocessors, dtype):
    x = 1000 + torch.randn(2, *images, dtype=dtype)
    with emulator.multiprocessors(multiprocessors):
        actual = of_channels(steps, "column_moments", x, whole_batch).double()
    of_sets = sets_of(x.double(), whole_batch)
    mean = of_sets.mean(2)
    squares = (of_sets - mean.unsqueeze(2)).square().sum(2)
    precision = torch.finfo(dtype).eps
    assert ((actual[:, :, 0] - mean).abs() < 4000 * precision).all()
    assert ((actual[:, :, 1] - squares).abs() < 1e5 * precision * (squares + 1)).all()


def test_sets_are_split_where_they_are_few(steps):
    x = torch.randn(9, 1, 40, 25, 8)
    launches_of = []
    for multiprocessors in (1, 99):
        with emulator.multiprocessors(multiprocessors), emulator.launches() as launches:
            of_channels(steps, "column_sums", x, True)
        launches_of.append(len(launches))
    assert launches_of == [1, 2]


def convolve(
    steps,
    to: int,
    shape: Shape,
    tasks: int,
    adds: bool,
    arrays: list,
    moments: Tensor | None = None,
    tf32: bool = False,
) -> None:
    parts = torch.empty(steps.part_numbers(), dtype=arrays[0].dtype)
    s = shape
    sizes = numbers(
        *(s.channels, s.outputs, *s.size, *s.kernel, *s.stride, *s.padding, *s.dilation, s.groups)
    )
    places = (ctypes.c_void_p * 9)(*(pointer(x).value for x in (*arrays, moments)))
    error = steps.run_convolution(
        *(to, arrays[0].dtype == torch.float32, ctypes.c_int64(tasks), ctypes.c_int64(s.examples)),
        *(adds, tf32, sizes, places, pointer(parts)),
    )
    assert error == 0, emulator.report()


@each_dtype
@each_device
@pytest.mark.parametrize("form", ["plain", "adds", "descends"])
@pytest.mark.parametrize("to", range(3), ids=["output", "input", "weight"])
@pytest.mark.parametrize("name", ["same", "wide", "depthwise"])
def test_two_pairs_go_into_one_sum(steps, name, to, form, multiprocessors, dtype):
    shape, tasks = SHAPES[name], 2
    torch.manual_seed(0)
    pairs = [shape.operands(to, tasks, dtype) for _ in range(2)]
    sums = sum(MAPS[to](shape, *pair) for pair in pairs)
    c = torch.randn(sums.shape, dtype=dtype)
    has_bias = to == 0 and form != "descends"
    bias = torch.randn(tasks, shape.outputs, dtype=dtype) if has_bias else None
    step_size = torch.rand(tasks, dtype=dtype) if form == "descends" else None
    expected = sums + (bias.double()[:, None, None, None] if has_bias else 0)
    if form == "adds":
        expected = expected + c.double()
    if form == "descends":
        factor = step_size.double().view(-1, *[1] * (sums.dim() - 1))
        expected = c.double() - factor * expected
    half = torch.empty_like(c)
    with emulator.multiprocessors(multiprocessors):
        arrays = [*pairs[0], *pairs[1], bias, step_size, c, half]
        convolve(steps, to, shape, tasks, form != "plain", arrays)
    assert_near(c, expected, TOLERANCE[dtype])
    assert torch.equal(half, c / 2)


# As float32, large enough for each of the tiles; where all are too few they are split.
WITH_MOMENTS = {
    "large": (1, Shape(4, 5, 70, (9, 8), (2, 2))),
    "narrow": (1, Shape(4, 4, 20, (9, 8), (2, 2))),
    "small": (1, Shape(1, 4, 20, (9, 3), (2, 2))),
    "split": (99, Shape(2, 40, 20, (9, 8))),
    "depthwise": (1, Shape(2, 3, 6, (9, 8), groups=3)),
}


@each_dtype
@pytest.mark.parametrize("tf32", [False, True], ids=["ieee", "tf32"])
@pytest.mark.parametrize("name", WITH_MOMENTS)
def test_moments_of_the_outputs_come_with_them(steps, name, tf32, dtype):
    multiprocessors, shape = WITH_MOMENTS[name]
    torch.manual_seed(0)
    x, w = shape.operands(0, 2, dtype)
    z = torch.full((2, shape.examples, *shape.out_size, shape.outputs), torch.nan, dtype=dtype)
    bias = 100 * torch.ones(2, shape.outputs, dtype=dtype)
    moments = torch.full((2, 4, shape.outputs), -7, dtype=dtype)
    arrays = [x, w, None, None, bias, None, z, torch.empty_like(z)]
    with emulator.multiprocessors(multiprocessors):
        convolve(steps, 0, shape, 2, False, arrays, moments, tf32)
    of_channels = z.double().flatten(1, 3)
    mean = of_channels.mean(1)
    squares = (of_channels - mean.unsqueeze(1)).square().sum(1)
    precision = 300 * torch.finfo(dtype).eps
    assert ((moments[:, 0] - mean).abs() < precision).all()
    assert ((moments[:, 1] - squares).abs() < precision * squares).all()
    assert (moments[:, 2:] == -7).all()


def test_every_launch_of_a_step_is_checked(steps):
    shape = SHAPES["same"]
    pair = shape.operands(2, 1, torch.float64)
    c = torch.empty(shape.weight_size, dtype=torch.float64)
    arrays = [*pair, None, None, None, None, c, torch.empty_like(c)]
    with emulator.multiprocessors(99), emulator.launches() as launches:
        convolve(steps, 2, shape, 1, False, arrays)
    assert len(launches) == 2
    for after in range(2):
        failing = emulator.failing_launch(after)
        with emulator.multiprocessors(99), failing, pytest.raises(AssertionError, match="assert 7"):
            convolve(steps, 2, shape, 1, False, arrays)
