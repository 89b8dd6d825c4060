"""The flat arena of a task's parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastmeta.core.parameter_layout import ParameterLayout
from fastmeta.core.step_sizes import StepSizes


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight


def arena_of(layout: ParameterLayout, *lead: int) -> torch.Tensor:
    size = torch.Size(lead).numel() * layout.numel
    return torch.arange(float(size), device=layout.device).reshape(*lead, layout.numel)


def test_a_tied_parameter_is_in_the_layout_once():
    layout = ParameterLayout.of(Tied())
    assert layout.names == ("first.weight", "first.bias", "second.bias")
    assert layout.sizes == (9, 3, 3)


def test_frozen_parameters_are_not_in_the_layout():
    net = nn.Linear(3, 2)
    net.weight.requires_grad_(False)
    assert ParameterLayout.of(net).names == ("bias",)


def test_views_share_the_arenas_memory(device):
    layout = ParameterLayout.of(nn.Linear(3, 2, device=device))
    arena = arena_of(layout, 4)
    views = layout.views(arena)
    arena[1, 7] = -1.0
    assert views["bias"][1].tolist() == [14.0, -1.0]
    assert views["weight"].shape == (4, 2, 3)


def test_flatten_inverts_views(device):
    layout = ParameterLayout.of(Tied().to(device))
    arena = arena_of(layout, 2, 5)
    assert torch.equal(layout.flatten(layout.views(arena)), arena)


def test_scalar_and_empty_parameters_have_their_place(device):
    module = nn.Module()
    module.scale, module.none = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.zeros(0, 3))
    module.weight = nn.Parameter(torch.ones(2))
    layout = ParameterLayout.of(module.to(device))
    views = layout.views(arena_of(layout, 2))
    assert [tuple(view.shape) for view in views.values()] == [(2,), (2, 0, 3), (2, 2)]
    assert torch.equal(layout.flatten(views), arena_of(layout, 2))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ([], [1, 1, 1]),
        ([1], [1, 1, 1]),
        ([2], [1, 1, 8]),
        ([8], [1, 1, 8]),
        ([4, 1], [1, 4, 1]),
        ([4, 2], [1, 4, 8]),
        ([4, 8], [1, 4, 8]),
        ([3, 1, 1], [3, 1, 1]),
        ([3, 1, 2], [3, 1, 8]),
        ([3, 4, 8], [3, 4, 8]),
        ([1, 4, 1], [1, 4, 1]),
    ],
)
def test_every_form_of_step_size_becomes_one_array(shape, expected, device):
    layout = ParameterLayout.of(nn.Linear(3, 2, device=device))
    lr = torch.ones(shape, device=device, requires_grad=True)
    array = StepSizes.of(lr, layout, tasks=4, steps=3).values
    assert list(array.shape) == expected
    array.sum().backward()
    assert lr.grad.sum() == array.numel()
    assert torch.equal(StepSizes.of(array, layout, tasks=4, steps=3).values, array)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
)
def test_a_number_keeps_its_digits_whatever_the_parameters(dtype, expected, device):
    layout = ParameterLayout.of(nn.Linear(3, 2, device=device, dtype=dtype))
    array = StepSizes.of(0.1, layout, tasks=4, steps=3).values
    assert array.shape == (1, 1, 1)
    assert array.device == layout.device
    assert torch.equal(array.cpu(), torch.full((1, 1, 1), 0.1, dtype=expected))


def test_a_step_size_per_parameter_is_repeated_over_its_elements(device):
    lr = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]], device=device)
    layout = ParameterLayout.of(nn.Linear(3, 2, device=device))
    first, second = StepSizes.of(lr, layout, tasks=4, steps=2).values[:, 0].tolist()
    assert first == [1.0] * 6 + [2.0] * 2
    assert second == [3.0] * 6 + [4.0] * 2
    assert StepSizes.of(lr[0, 0], layout, tasks=4, steps=2).values[0, 0].tolist() == first


@pytest.mark.parametrize(
    ("lr", "error", "message"),
    [
        ("0.1", TypeError, "lr: expected a number or a tensor, got str"),
        (True, TypeError, "lr: expected a number or a tensor, got bool"),
        (torch.ones(8).double(), TypeError, "lr: expected dtype torch.float32"),
        (torch.ones(8, device="meta"), ValueError, "lr: expected device cpu, got meta"),
        (torch.ones(3), ValueError, r"L = 2, P = 8, T = 4, K = 5; got \[3\]"),
        (torch.ones(0), ValueError, r"got \[0\]"),
        (torch.ones(3, 8), ValueError, r"got \[3, 8\]"),
        (torch.ones(4, 1, 8), ValueError, r"got \[4, 1, 8\]"),
        (torch.ones(5, 3, 8), ValueError, r"got \[5, 3, 8\]"),
        (torch.ones(5, 4, 3), ValueError, r"got \[5, 4, 3\]"),
        (torch.ones(1, 1, 1, 1), ValueError, r"got \[1, 1, 1, 1\]"),
    ],
)
def test_a_bad_step_size_is_named(lr, error, message):
    with pytest.raises(error, match=message):
        StepSizes.of(lr, ParameterLayout.of(nn.Linear(3, 2)), tasks=4, steps=5)


def mixed(value: torch.Tensor) -> nn.Module:
    module = nn.Linear(2, 2)
    module.extra = nn.Parameter(value)
    return module


@pytest.mark.parametrize(
    ("module", "error", "message"),
    [
        (torch.relu, TypeError, "expected an nn.Module"),
        (nn.ReLU(), ValueError, "ReLU has no trainable parameter"),
        (nn.LazyLinear(2), ValueError, "parameter 'weight' is not initialised"),
        (mixed(torch.zeros(1).double()), TypeError, "one dtype"),
        (mixed(torch.zeros(1, device="meta")), ValueError, "one device"),
    ],
)
def test_a_module_without_a_layout_is_refused(module, error, message):
    with pytest.raises(error, match=message):
        ParameterLayout.of(module)


def test_wrong_arenas_and_tensors_are_refused():
    layout = ParameterLayout.of(nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"expected shape \[..., 8\], got \[4, 7\]"):
        layout.views(torch.zeros(4, 7))
    with pytest.raises(ValueError, match=r"expected a tensor for each of \['bias'\]"):
        layout.flatten({"weight": torch.zeros(4, 2, 3)})
    with pytest.raises(ValueError, match=r"expected 'bias' of shape \[4, 2\], got \[3, 2\]"):
        layout.flatten({"weight": torch.zeros(4, 2, 3), "bias": torch.zeros(3, 2)})
