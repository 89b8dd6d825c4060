"""How layers of images lower, in which layout their values are, and what does not lower."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta as fm
from fastmeta.engines.program.lowering import Lowering, Program
from fastmeta.ops.task_program.bytecode import Code, Opcode
from tests.helpers.lowering import assert_lowers, reason
from tests.helpers.programs import IMAGES, build, lowered, shape_of


class Calls(nn.Module):
    """A module whose forward is a function of itself and x: three channels in and out."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 2)
        self.depthwise, self.sequence = nn.Conv2d(3, 6, 2, groups=3), nn.Conv1d(3, 3, 3)
        self.norm, self.linear = nn.BatchNorm2d(3), nn.Linear(3, 2)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


FORWARDS = {
    "conv2d": lambda m, x: F.conv2d(x, m.second.weight, m.second.bias, 2, (1, 0), dilation=2),
    "conv2d_same": lambda m, x: F.conv2d(x, m.first.weight, padding="same"),
    "conv2d_valid": lambda m, x: torch.conv2d(x, m.first.weight, padding="valid"),
    "conv2d_depthwise": lambda m, x: F.conv2d(x, m.depthwise.weight, groups=3, stride=(1, 2)),
    "conv1d": lambda m, x: F.conv1d(x.flatten(2), m.sequence.weight, m.sequence.bias, 2, 1),
    "batch_norm": lambda m, x: F.batch_norm(m.first(x), None, None, m.norm.weight, training=True),
    "group_norm": lambda m, x: F.group_norm(m.first(x), 3, m.norm.weight, m.norm.bias, 0.1),
    "max_pool2d": lambda m, x: F.max_pool2d(m.first(x), 3, stride=2, padding=1),
    "max_pool1d": lambda m, x: F.max_pool1d(m.first(x).flatten(2), 3),
    "avg_pool2d": lambda m, x: F.avg_pool2d(m.first(x), (2, 3), 1, 1, count_include_pad=False),
    "avg_pool1d": lambda m, x: F.avg_pool1d(m.first(x).flatten(2), 3, 2),
    "adaptive_2d": lambda m, x: F.adaptive_avg_pool2d(m.first(x), (1, 1)).flatten(1),
    "adaptive_1d": lambda m, x: F.adaptive_avg_pool1d(m.first(x).flatten(2), 1),
    "mean": lambda m, x: m.first(x).mean((2, 3)),
    "mean_of_negative_dimensions": lambda m, x: torch.mean(m.first(x), dim=[-1, -2], keepdim=True),
    "mean_of_rows": lambda m, x: m.first(x).mean(-1) + m.first(x).mean(3, True).flatten(2),
    "mean_of_columns": lambda m, x: m.first(x).mean(2).flatten(1),
    "mean_of_positions": lambda m, x: m.linear(m.first(x).flatten(2).mean(2)),
    "view_of_positions": lambda m, x: m.first(x).view(x.size(0), 3, -1).flatten(1),
    "another_view": lambda m, x: m.first(m.first(x).reshape(-1, 3, 2, 8)),
    "one_position": lambda m, x: m.linear(m.second(F.max_pool2d(x, 2)).flatten(1)),
    "images_as_rows": lambda m, x: m.linear(m.first(x).view(-1, 16, 3)).flatten(1),
    "add_of_both_layouts": lambda m, x: m.first(x) + torch.tanh(x),
    "add_in_place": lambda m, x: m.first(x).add_(x),
    "relu_in_place": lambda m, x: m.second(torch.relu_(m.norm(m.first(x)))),
    "relu_in_place_of_a_view": lambda m, x: torch.relu_(m.first(x).flatten(1)),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_functions_and_methods(name):
    assert_lowers(Calls(FORWARDS[name]), 3, 4, 4)


def opcodes(net: nn.Module, *shape: int) -> list[Opcode]:
    code = Code.decode(lowered(net, F.mse_loss, shape).code)
    return [instruction.opcode for instruction in code.instructions]


TRANSPOSES = {
    # What the module sees and what lies in memory agree for one channel and for one position.
    "one_channel": (lambda: fm.models.Conv4(2, 3, 1, 16), (1, 16, 16), 0),
    "three_channels": (lambda: fm.models.Conv4(2, 3, 3, 16), (3, 16, 16), 1),
    "flattened": (lambda: fm.models.Conv4(2, 3, 1, 32), (1, 32, 32), 1),
    "global_mean": (lambda: fm.models.Conv4(2, 3, 1, 20, "stride"), (1, 20, 20), 0),
    "features": (lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), (3,), 0),
    "maps_as_outputs": (lambda: nn.Conv2d(2, 2, 1), (2, 3, 3), 2),
    "two_readers_of_the_input": (lambda: Calls(lambda m, x: m.first(x) + m.first(x)), (3, 4, 4), 2),
    "there_and_back": (
        lambda: Calls(lambda m, x: m.first(m.first(x).view(-1, 48).view(-1, 3, 4, 4)).flatten(1)),
        (3, 4, 4),
        3,  # of which nothing reads the second
    ),
    "every_other_layout": (
        lambda: Calls(lambda m, x: m.first(torch.tanh(m.first(x).flatten(1)).view(-1, 3, 4, 4))),
        (3, 4, 4),
        4,
    ),
}


@pytest.mark.parametrize("name", TRANSPOSES)
def test_a_value_is_transposed_once_where_it_must_be(name):
    make, shape, count = TRANSPOSES[name]
    assert opcodes(make(), *shape).count(Opcode.TRANSPOSE) == count
    assert_lowers(make(), *shape)


def test_the_code_of_images_by_hand():
    """Two channels of 3x4: transpose, convolution 2x3, batch norm, 2x2 max pool, transpose back."""
    layers = [nn.Conv2d(2, 3, (2, 3), padding=(0, 1)), nn.BatchNorm2d(3, eps=0.5)]
    net = nn.Sequential(*layers, nn.MaxPool2d(2, stride=(1, 2), padding=(0, 1)))
    half = 0x3FE0000000000000  # 0.5 as float64
    rows = [
        [7, 0, -1, 1, -1, -1, 2, 12],
        [4, 1, -1, 2, 0, 36, 2, 3, 3, 4, 2, 3, 1, 1, 0, 1, 1, 1, 1],
        [5, 2, -1, 3, 39, 42, 3, 0, half, -1, -1, 1],
        [6, 3, -1, 4, -1, -1, 0, 3, 2, 4, 2, 2, 1, 2, 0, 1, 0],
        [7, 4, -1, 5, -1, -1, 3, 3],
    ]
    words = lowered(net, F.mse_loss, (2, 3, 4)).code.tolist()
    assert words[:6] == [3, 6, 5, 45, 0, 5]
    assert words[16:22] == [24, 24, 24, 24, 9, 9]
    assert words[22:] == [word for row in rows for word in (*row, *[0] * (24 - len(row)))]


def test_layers_in_words():
    program = lowered(build("resnet12"), F.cross_entropy, shape_of("resnet12"))
    first = "channels last, convolution 2 to 2, 3x3, batch norm 2, leaky relu, convolution"
    assert ", ".join(program.layers).startswith(first)
    assert program.layers[-3:] == ("global mean", "linear 4 to 3", "cross entropy")
    for name, words in {
        "sequences": "depthwise convolution 3 to 3, 1x2",
        "max_pool": "max pool 2x2",
        "average_pool": "average pool 2x1",
        "group_norm": "group norm 4 by 2",
        "instance_norm": "instance norm 4",
    }.items():
        assert words in lowered(build(name), F.mse_loss, shape_of(name)).layers


def modified(layer: nn.Module, **options) -> nn.Module:
    for name, value in options.items():
        setattr(layer, name, value)
    return layer


def view_is_changed(m: Calls, x: Tensor) -> Tensor:
    y = m.first(x)
    torch.relu_(y.flatten(1))
    return m.second(y)


def used_after_its_view(m: Calls, x: Tensor) -> Tensor:
    y = m.first(x)
    flat = y.flatten(1)
    torch.relu_(y)
    return flat


def calls(function: Callable[..., Tensor]) -> Callable[[], nn.Module]:
    return lambda: Calls(function)


REASONS = {
    "model is a Conv3d, which the program does not have yet": lambda: nn.Conv3d(3, 2, 1),
    "model is a Conv2d: it takes 2 channels, and examples there have 3": lambda: nn.Conv2d(2, 2, 1),
    "model is a Conv1d: it takes [channels, length], and examples": lambda: nn.Conv1d(3, 2, 1),
    "its padding mode is 'reflect'": lambda: nn.Conv2d(3, 2, 3, padding=1, padding_mode="reflect"),
    "it has 2 groups of 4 channels, not 1 or as many": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1, groups=2)
    ),
    "it pads one side more than the other": lambda: nn.Conv2d(3, 2, 2, padding="same"),
    "it pads to the same size, and has strides": lambda: modified(
        nn.Conv2d(3, 2, 3, padding="same"), stride=(2, 2)
    ),
    "its windows are larger than images of 4x4": lambda: nn.Conv2d(3, 2, 5),
    "its windows are larger than images of 4x4 ": lambda: nn.Conv2d(3, 2, 3, dilation=2),
    "a size of it is out of range": lambda: modified(nn.Conv2d(3, 2, 1), stride=(0, 1)),
    "a size of it is out of range ": lambda: nn.Conv2d(3, 2, 1, padding=2**20),
    "an option of it is (1, 1, 1), not 2 integers": lambda: modified(
        nn.Conv2d(3, 2, 1), stride=(1, 1, 1)
    ),
    "model calls conv2d: its weight is no parameter": calls(
        lambda m, x: F.conv2d(x, torch.ones(3, 3, 1, 1)) + m.first(x)
    ),
    "model is a BatchNorm2d: a parameter of it has shape [2], not [3]": lambda: nn.BatchNorm2d(2),
    "model is a BatchNorm1d: it does not take examples of shape [3, 4, 4]": lambda: nn.BatchNorm1d(
        3
    ),
    "model calls batch_norm: it has running statistics, and": calls(
        lambda m, x: F.batch_norm(m.first(x), m.norm.running_mean, m.norm.running_var)
    ),
    "model calls batch_norm: it has running statistics, and ": calls(
        lambda m, x: F.batch_norm(m.first(x), None, None)
    ),
    "it has 2 groups, and examples there 3 channels": calls(
        lambda m, x: F.group_norm(m.first(x), 2)
    ),
    "model.1 is a InstanceNorm2d: it does not take examples of shape [3, 1, 1]": lambda: (
        nn.Sequential(nn.Conv2d(3, 3, 4), nn.InstanceNorm2d(3))
    ),
    "model.1 is a MaxPool2d: it returns indices": lambda: nn.Sequential(
        nn.Conv2d(3, 3, 1), nn.MaxPool2d(2, return_indices=True)
    ),
    "model.1 is a MaxPool2d: it is dilated": lambda: nn.Sequential(
        nn.Conv2d(3, 3, 1), nn.MaxPool2d(2, dilation=2)
    ),
    "it rounds sizes up": lambda: nn.Sequential(
        nn.Conv2d(3, 3, 1), nn.AvgPool2d(3, ceil_mode=True)
    ),
    "its padding is more than half of its windows": lambda: nn.Sequential(
        nn.Conv2d(3, 3, 1), modified(nn.MaxPool2d(2), padding=2)
    ),
    "it divides by another number": lambda: nn.Sequential(
        nn.Conv2d(3, 3, 1), nn.AvgPool2d(2, divisor_override=3)
    ),
    "its output size is 2, not 1": lambda: nn.Sequential(
        nn.Conv2d(3, 3, 1), nn.AdaptiveAvgPool2d(2)
    ),
    "model calls mean: dimensions 1 of 4 are not positions of images": calls(
        lambda m, x: m.first(x).mean(1)
    ),
    "model calls mean: dimensions None of 4 are not": calls(lambda m, x: m.first(x).mean()),
    "model calls mean with unknown options": calls(
        lambda m, x: m.first(x).mean((2, 3), dtype=torch.float64)
    ),
    "model calls add: it adds 1 times [2, 4, 4] to [3, 4, 4]": calls(
        lambda m, x: x + m.linear(m.first(x).view(-1, 16, 3)).view(-1, 2, 4, 4)
    ),
    "relu works in place on a tensor that is used elsewhere": calls(view_is_changed),
    "relu works in place on a tensor that is used elsewhere ": calls(used_after_its_view),
}


@pytest.mark.parametrize("words", REASONS)
def test_what_does_not_lower_says_why(words):
    assert words.strip() in reason(REASONS[words](), 3, 4, 4)


def test_running_statistics_change_and_a_lowering_stays():
    net = build("conv4")
    lowering = Lowering(net, F.cross_entropy)
    x = torch.randn(2, *shape_of("conv4"), dtype=torch.float64)
    net(x)
    net.load_state_dict(net.state_dict())
    assert lowering.current(net, F.cross_entropy)
    net.eval()
    assert not lowering.current(net, F.cross_entropy)


@pytest.mark.parametrize(
    ("name", "least"), [("conv4", 1), ("batch_norm_of_features", 2), ("instance_norm", 1)]
)
def test_examples_that_a_batch_must_have(name, least):
    program = lowered(build(name), F.mse_loss, shape_of(name))
    assert program.least_examples == least
    assert program.takes(0) and program.takes(2) and program.takes(1) == (least == 1)


def test_a_group_of_one_value_takes_two_examples():
    net = nn.Sequential(nn.Linear(3, 4), nn.GroupNorm(4, 4))
    assert lowered(net, F.mse_loss, (3,)).least_examples == 2
    assert lowered(net, F.mse_loss, (3,)).takes(1) is False
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        net(torch.ones(1, 3))


@pytest.mark.parametrize("name", ["conv4_of_colours", "resnet12", "sequences", "strided"])
def test_images_that_fit_are_found_without_a_batch(name):
    program = Lowering(build(name), F.cross_entropy).program()
    assert isinstance(program, Program)
    assert program.input_shape[0] == shape_of(name)[0]


def test_where_no_square_image_fits_a_batch_is_asked_for():
    text = reason_without_a_batch(nn.Sequential(nn.Conv2d(1, 1, 3), nn.Flatten(), nn.Linear(7, 3)))
    assert text.startswith("model.2 is a Linear: it takes 7 features, and examples there have")
    assert text.endswith("(with examples [1, 256, 256]; a batch shows which they are)")
    text = reason_without_a_batch(nn.Sequential(nn.Conv2d(1, 1, 3), nn.Softmax(1)))
    assert text == "model.1 is a Softmax, which the program does not have yet"


def reason_without_a_batch(net: nn.Module) -> str:
    program = Lowering(net, F.mse_loss).program()
    assert isinstance(program, str)
    return program


def test_every_image_network_has_an_instruction_of_its_own():
    seen = {opcode for name in IMAGES for opcode in opcodes(build(name), *shape_of(name))}
    assert seen == set(Opcode)
