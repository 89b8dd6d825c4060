"""Task programs of images, where every step is a launch for all tasks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastmeta.ops.task_program import COMPILED, NAMES, reference
from tests.cuda_emulation import emulator
from tests.cuda_emulation.checks import fresh, ieee, no_fill, rounded_to_tf32  # noqa: F401 (a fixture)
from tests.helpers.program_checks import Setting, assert_same, results
from tests.helpers.programs import IMAGES, LOSSES, Raw, build, shape_of, with_running_statistics

TINY = {"tasks": 2, "support": 3, "queries": 2}


# A residual network has the same layers, and takes half a minute.
@pytest.mark.parametrize("name", [name for name in IMAGES if name != "resnet12"])
def test_every_kind_of_layer_of_images(name):
    Setting(name, "cross_entropy", "cpu", steps=1, **TINY).check("meta_gradient")


@pytest.mark.parametrize("op", NAMES)
def test_every_barrier_of_an_op_on_images(op):
    """With many multiprocessors, which share sets of positions and sums."""
    setting = Setting("fused", "cross_entropy", "cpu", torch.float32, **TINY)
    with emulator.multiprocessors(99):
        setting.check(op)
        if op == "products":
            setting.check(op, gauss_newton=True)


@pytest.mark.parametrize("name", ["conv4", "wide"])
def test_a_convolution_and_its_norm_in_float32(name):
    Setting(name, "cross_entropy", "cpu", torch.float32, steps=1, **TINY).check("gradient")


def test_every_launch_of_a_program_of_images_is_checked():
    args = Setting("fused", "cross_entropy", "cpu", steps=1, **TINY).arguments("meta_gradient")
    with emulator.launches() as launches:
        expected = COMPILED.meta_gradient(*args)
    for after in range(0, len(launches), 5):
        message = "^(task_program|(support|query)_y): too many resources requested"
        with emulator.failing_launch(after), pytest.raises(RuntimeError, match=message):
            COMPILED.meta_gradient(*fresh(args))
    for a, e in zip(COMPILED.meta_gradient(*args), expected, strict=True):
        assert torch.equal(a, e)


def test_norms_on_running_statistics_that_are_not_adapted_make_no_sums():
    """An adapted one takes three launches more: both sums, and from them a gradient each."""

    def launches_of_gradient(adapted: bool) -> int:
        net = nn.Sequential(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 3))
        net[1].requires_grad_(adapted)
        raw = Raw.of(with_running_statistics(net), LOSSES["mse"], (1, 3, 3))
        with emulator.multiprocessors(1), emulator.launches() as launches:
            COMPILED.gradient(*raw, torch.ones(1, 2, 1, 3, 3), torch.ones(1, 2, 3), False)
        return len(launches)

    assert launches_of_gradient(adapted=True) == launches_of_gradient(adapted=False) + 3


def test_convolutions_and_nothing_else_are_tf32_where_the_setting_allows_it():
    """With the operands of the convolution rounded, the reference gives the same in float64."""
    code, theta, frozen, x = Setting("wide", "mse", "cpu", torch.float32, **TINY).arguments(
        "forward"
    )
    net = build("wide", dtype=torch.float32)
    net[0].weight.data = rounded_to_tf32(net[0].weight.data)
    rounded = Raw.of(net.double(), LOSSES["mse"], shape_of("wide")).theta
    expected = reference.forward(code, rounded, frozen.double(), rounded_to_tf32(x).double())
    torch.backends.cudnn.allow_tf32 = True
    assert_same(COMPILED.forward(code, theta, frozen, x), expected, 2e-6)


@pytest.mark.parametrize("op", NAMES)
def test_a_program_in_tf32_is_near_that_in_float32(op):
    args = Setting("wide", "mse", "cpu", torch.float32, steps=1, **TINY).arguments(op)
    expected = results(op, args)
    torch.backends.cudnn.allow_tf32 = True
    for actual, e in zip(results(op, args), expected, strict=True):
        assert_same(actual, e, 1e-2)
        assert not torch.equal(actual, e)


@pytest.mark.parametrize(
    "layer, examples, size, message",
    [
        (lambda: nn.Conv2d(1, 1, 1), 1, 46341, "numbers of an input image"),
        (lambda: nn.BatchNorm2d(1), 2, 2**15, "the positions of a task's images"),
        (lambda: nn.MaxPool2d(3), 2, 2**15, "the positions of a task's images"),
    ],
    ids=["convolution", "norm", "pool"],
)
def test_images_that_the_kernels_cannot_count_are_refused(layer, examples, size, message):
    net = nn.Sequential(layer(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 3))
    raw = Raw.of(net, LOSSES["mse"], (1, size, size))
    with no_fill(), emulator.launches() as launches:
        x = torch.empty(1, examples, 1, size, size)
        with pytest.raises(RuntimeError, match=rf"^task_program: {message} .* at most \d+ on CUDA"):
            COMPILED.forward(*raw, x)
    assert launches == []
