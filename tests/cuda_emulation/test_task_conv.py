"""The three maps of convolution against PyTorch's own, in float64."""

from __future__ import annotations

from math import prod

import pytest
import torch
from torch import Tensor

from tests.cuda_emulation import emulator
from tests.cuda_emulation.checks import (
    MAPS,
    SHAPES,
    TOLERANCE,
    Shape,
    assert_near,
    first,
    ieee,
    last,
    no_fill,
    output,
    rounded_to_tf32,
)

__all__ = ["ieee"]  # a fixture of every test here

OPS = torch.ops.fastmeta


each_shape = pytest.mark.parametrize("name", SHAPES)
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
each_map = pytest.mark.parametrize("to", range(3), ids=["output", "input", "weight"])


def run(shape: Shape, to: int, left: Tensor, right: Tensor) -> Tensor:
    """By the op, whose images are channels-last in memory, as those are that it is given."""
    if to == 0:
        return last(OPS.task_conv2d(first(left), right, None, *shape.options))
    if to == 1:
        return last(OPS.task_conv2d_input(first(left), right, shape.size, *shape.options))
    return OPS.task_conv2d_weight(first(left), first(right), shape.kernel, *shape.options)


@each_dtype
@each_map
@each_shape
def test_a_map_agrees_with_torch(name, to, dtype):
    torch.manual_seed(0)
    shape = SHAPES[name]
    left, right = shape.operands(to, 3, dtype)
    actual = run(shape, to, left, right)
    has_both_layouts = to < 2 and first(left).is_contiguous()  # one channel, or one place
    assert (first(actual) if has_both_layouts else actual).is_contiguous()
    assert actual.dtype == dtype
    assert_near(actual, MAPS[to](shape, left, right), TOLERANCE[dtype])


# Tasks and multiprocessors: with one of these every tile is as large as it can be, with many sums
# are split.
@each_dtype
@each_map
@pytest.mark.parametrize("multiprocessors", [1, 300])
@pytest.mark.parametrize("channels, outputs", [(64, 64), (33, 30), (1, 70), (40, 16)], ids=str)
def test_tiles_of_a_convolution(channels, outputs, multiprocessors, to, dtype):
    torch.manual_seed(0)
    shape = Shape(2, channels, outputs, (10, 9), padding=(1, 1))
    left, right = shape.operands(to, 1, dtype)
    with emulator.multiprocessors(multiprocessors), emulator.launches() as launches:
        actual = run(shape, to, left, right)
    assert_near(actual, MAPS[to](shape, left, right), TOLERANCE[dtype])
    if multiprocessors == 1 and to < 2:
        assert len(launches) == 1


@each_map
@pytest.mark.parametrize("multiprocessors", [1, 300])
@pytest.mark.parametrize("channels, outputs", [(40, 36), (33, 30), (1, 70), (8, 16)], ids=str)
def test_tensor_cores_where_the_setting_allows_tf32(channels, outputs, multiprocessors, to):
    torch.manual_seed(0)
    shape = Shape(3, channels, outputs, (8, 7), padding=(1, 1))
    left, right = shape.operands(to, 1, torch.float32)
    torch.backends.cudnn.allow_tf32 = True
    with emulator.multiprocessors(multiprocessors):
        actual = run(shape, to, left, right)
    expected = MAPS[to](shape, rounded_to_tf32(left), rounded_to_tf32(right))
    assert_near(actual, expected, TOLERANCE[torch.float32])
    assert not torch.equal(actual, run_in_ieee(shape, to, left, right))


def run_in_ieee(shape: Shape, to: int, left: Tensor, right: Tensor) -> Tensor:
    torch.backends.cudnn.allow_tf32 = False
    return run(shape, to, left, right)


def test_tf32_leaves_float64_alone():
    shape = SHAPES["same"]
    operands = shape.operands(0, 1, torch.float64)
    torch.backends.cudnn.allow_tf32 = True
    assert_near(run(shape, 0, *operands), output(shape, *operands), TOLERANCE[torch.float64])


@each_dtype
def test_a_bias_belongs_to_its_task_and_output(dtype):
    shape = SHAPES["same"]
    x, w = shape.operands(0, 2, dtype)
    bias = torch.randn(2, shape.outputs, dtype=dtype)
    actual = last(OPS.task_conv2d(first(x), w, bias, *shape.options))
    expected = output(shape, x, w) + bias.double()[:, None, None, None]
    assert_near(actual, expected, TOLERANCE[dtype])


@each_map
def test_tasks_can_share_an_operand(to):
    shape = SHAPES["same"]
    left, right = shape.operands(to, 1, torch.float64)
    shared, own = left.expand(3, *left.shape[1:]), torch.cat([right, -right, 2 * right])
    actual = run(shape, to, shared, own)
    assert_near(actual, MAPS[to](shape, shared, own), TOLERANCE[torch.float64])


@each_map
def test_sums_have_one_order(to):
    """The same bits each time, and for a task alone and among others."""
    shape = SHAPES["wide"]
    left, right = shape.operands(to, 3, torch.float32)
    with emulator.multiprocessors(1):
        together = run(shape, to, left, right)
        assert torch.equal(run(shape, to, left, right), together)


@each_map
def test_nothing_past_the_ends_is_read(to):
    """Nor are numbers of channels that are not there: they could be NaN."""
    shape = SHAPES["stride"]
    left, right = shape.operands(to, 2, torch.float64)
    left[1], right[1] = torch.nan, torch.nan
    actual = run(shape, to, left, right)
    assert_near(actual[:1], MAPS[to](shape, left[:1], right[:1]), TOLERANCE[torch.float64])
    assert actual[1].isnan().any()


def test_no_example_gives_no_output_and_a_gradient_of_zero():
    shape = Shape(0, 2, 3, (5, 5))
    x, w = shape.operands(0, 2, torch.float64)
    assert run(shape, 0, x, w).numel() == 0
    gradient = run(shape, 2, *shape.operands(2, 2, torch.float64))
    assert gradient.shape == w.shape and prod(gradient.shape) > 0 and (gradient == 0).all()


@each_map
def test_every_launch_is_checked(to):
    shape = SHAPES["same"]
    operands = shape.operands(to, 1, torch.float64)
    with emulator.launches() as launches:
        run(shape, to, *operands)
    for after in range(len(launches)):
        message = "^task_conv2d: too many resources requested"
        with emulator.failing_launch(after), pytest.raises(RuntimeError, match=message):
            run(shape, to, *operands)


@each_map
def test_work_goes_to_the_current_stream_of_the_tensors_device(to):
    shape = SHAPES["same"]
    operands = shape.operands(to, 1, torch.float64)
    with emulator.devices(current=0, of_tensors=1), emulator.current_stream(device=1, stream=1):
        with emulator.launches() as launches:
            run(shape, to, *operands)
        assert emulator.current_device() == 0
    assert {(launch.device, launch.stream) for launch in launches} == {(1, 1)}


PIXEL = (1, 1)
# What kernels would count past 2^31, and a convolution of which nothing else is too large.
UNCOUNTABLE = {
    "numbers of an input image": Shape(1, 3, 1, (2**15, 2**15), PIXEL),
    "numbers of an output image": Shape(1, 1, 3, (2**15, 2**15), PIXEL),
    "channels x kernel size": Shape(1, 2**16, 1, PIXEL, (2**15, 1), padding=(2**14, 0)),
    "outputs x kernel size": Shape(1, 1, 2**16, PIXEL, (2**15, 1), padding=(2**14, 0)),
    "the padded height or width": Shape(1, 1, 1, PIXEL, PIXEL, (1, 2**29), (0, 2**30)),
    "the stride": Shape(1, 1, 1, PIXEL, PIXEL, (1, 2**31)),
    "the dilation": Shape(1, 1, 1, PIXEL, PIXEL, dilation=(2**30, 1)),
}


@each_map
@pytest.mark.parametrize("what", UNCOUNTABLE)
def test_what_the_kernels_cannot_count_is_refused(what, to):
    """Before there is memory for it: the operands are one number each."""
    shape = UNCOUNTABLE[what]
    one = torch.zeros(())
    images = one.expand(1, 1, *shape.size, shape.channels)
    gradients = one.expand(1, 1, *shape.out_size, shape.outputs)
    left = images if to == 0 else gradients
    right = images if to == 2 else one.expand(1, *shape.weight_size)
    message = rf"task_conv2d: {what}.*: expected at most \d+ on CUDA, got \d+"
    with emulator.launches() as launches, pytest.raises(RuntimeError, match=message):
        run(shape, to, left, right)
    assert launches == []


@pytest.mark.parametrize("to", range(2), ids=["output", "input"])
def test_an_image_of_almost_2_to_the_31_numbers(to):
    """The last block alone, next to no page of whose images is real."""
    shape = Shape(1, 1, 1, (46340, 46340), PIXEL)
    with no_fill(), emulator.only_blocks(-1, 1):
        image = torch.empty(1, 1, *shape.size, 1, dtype=torch.bfloat16)
        image[0, 0, -1, -8:, 0] = torch.arange(8)
        result = run(shape, to, image, torch.full((1, 1, 1, 1, 1), 2.0, dtype=torch.bfloat16))
    assert result[0, 0, -1, -8:, 0].tolist() == list(range(0, 16, 2))
