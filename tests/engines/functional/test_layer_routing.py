"""Layers of images of any module run on fastmeta's kernels in the functional engine."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastmeta as fm
from fastmeta.engines.base import InnerLoopOptions, TaskBatch
from fastmeta.engines.functional import layer_routing as _routing
from fastmeta.engines.functional.engine import FunctionalEngine
from fastmeta.engines.functional.task_module import TaskModule

pytestmark = pytest.mark.skipif(
    not fm.build_info()["native"], reason="the native extension was not built"
)


class Net(nn.Module):
    """Layers and calls by position and by name; the program lowers no sine."""

    def __init__(self, first: nn.Module):
        super().__init__()
        self.first = first
        self.norm = nn.BatchNorm2d(16)
        self.weight = nn.Parameter(torch.randn(16, 16, 3, 3) / 12)
        self.bias = nn.Parameter(torch.randn(16))
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = self.norm(self.first(x)).sin()
        x = F.conv2d(input=x, weight=self.weight, bias=self.bias, padding=1).tanh()
        x = torch.conv2d(x, self.weight, None, 2, 1, 1, 1)
        x = F.batch_norm(x, None, None, training=True, eps=0.1)
        return self.head(x.view(*x.shape[:2], -1).mean(2))


FIRSTS = {
    "dense": lambda: nn.Conv2d(16, 16, 3, stride=2, padding=1, dilation=2),
    "same": lambda: nn.Conv2d(16, 16, (3, 2), padding="same"),
    "depthwise": lambda: nn.Conv2d(16, 16, 3, groups=16),
    "grouped": lambda: nn.Conv2d(16, 16, 3, groups=4),
    "reflected": lambda: nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect"),
}


@pytest.fixture
def calls(monkeypatch):
    """The names of the routed calls, as they are made."""
    made = []

    def counted(name):
        def call(*args, **kwargs):
            made.append(name)
            return getattr(fm, name)(*args, **kwargs)

        return call

    for name in ("task_conv2d", "task_batch_norm"):
        monkeypatch.setattr(_routing, name, counted(name))
    return made


def engine_and_batch(first, device, dtype=torch.float64, **options):
    torch.manual_seed(3)
    net = Net(FIRSTS[first]()).to(device, dtype)
    x = torch.randn(2, 3, 16, 9, 8, dtype=dtype, device=device)
    y = torch.arange(3, device=device).repeat(2, 1)
    engine = FunctionalEngine(net, F.cross_entropy, InnerLoopOptions(steps=2, **options))
    return engine, (0.3, TaskBatch(x, y, x.cos(), y))


@pytest.mark.parametrize("mode", ["reverse", "forward"])
@pytest.mark.parametrize("first", FIRSTS)
def test_the_gradient_is_that_of_torchs_convolutions(first, mode, device, calls):
    engine, batch = engine_and_batch(first, device, hvp_mode=mode, memory="recompute")
    loss, outputs, grads, *_ = engine.meta_gradient(*batch)
    forwards, rest = divmod(calls.count("task_conv2d"), 2 if first == "grouped" else 3)
    assert forwards >= 5 and rest == 0  # two steps, there and back, and the queries
    assert calls.count("task_batch_norm") == 2 * forwards
    calls.clear()
    with fm.use_backend("torch"):
        expected = engine.meta_gradient(*batch)
    assert not calls
    for actual, plain in zip((loss, outputs, grads), expected, strict=False):
        torch.testing.assert_close(actual, plain, rtol=1e-10, atol=1e-12)


def test_what_is_not_routed(device, calls):
    engine, (lr, batch) = engine_and_batch("dense", device, torch.float32)
    single = [tensor[:1] for tensor in batch.data]
    engine.meta_gradient(lr, TaskBatch(*single))  # without vmap a convolution is an ordinary one
    assert set(calls) == {"task_batch_norm"}
    engine.meta_gradient(lr, batch)
    assert "task_conv2d" in calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_routes_norms_in_float32_and_convolutions_in_its_dtype(dtype, device, calls):
    engine, batch = engine_and_batch("dense", device, torch.float32)
    with torch.autocast(device, dtype):
        engine.meta_gradient(*batch)
    routed = (device, dtype) != ("cpu", torch.bfloat16)
    assert set(calls) == {"task_batch_norm", *(["task_conv2d"] if routed else [])}


def test_with_weights_that_the_tasks_share_norms_alone_are_routed(device, calls):
    torch.manual_seed(3)
    net = Net(FIRSTS["dense"]()).double().to(device)
    x = torch.randn(3, 4, 16, 9, 8, dtype=torch.float64, device=device)
    call = TaskModule(net)
    with call.conditions():
        outputs = call.outputs({}, x)
    assert calls == ["task_batch_norm"] * 2
    expected = torch.stack([net(images) for images in x])
    torch.testing.assert_close(outputs, expected, rtol=1e-10, atol=1e-12)
    found, wanted = (
        torch.autograd.grad(y.sin().sum(), list(net.parameters())) for y in (outputs, expected)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_norms_by_running_statistics_are_not_routed(device, calls):
    options = {"norm_statistics": "running", "memory": "recompute"}
    engine, batch = engine_and_batch("dense", device, **options)
    engine.module.norm.running_var.fill_(4.0)
    engine.module.eval()
    assert engine.module.norm.weight.numel() == 16
    engine.meta_gradient(*batch)
    assert calls.count("task_conv2d") == 3 * calls.count("task_batch_norm") > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_are_routed_but_for_bfloat16_on_a_cpu(dtype, device, calls):
    engine, batch = engine_and_batch("dense", device, dtype)
    loss, *_ = engine.meta_gradient(*batch)
    assert bool(calls) == ((device, dtype) != ("cpu", torch.bfloat16))
    with fm.use_backend("torch"):
        expected, *_ = engine.meta_gradient(*batch)
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=2e-2)


def test_norms_of_images_of_one_pixel(device):
    """Whose layout is both; under vmap group norm refuses one of the two."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(2, 4, 5), nn.GroupNorm(2, 4), nn.Flatten()).to(device)
    net.requires_grad_(False)
    net[1].requires_grad_(True)
    x = torch.randn(3, 4, 2, 5, 5, device=device)
    y = torch.zeros(3, 4, dtype=torch.long, device=device)
    engine = FunctionalEngine(net, F.cross_entropy)
    loss, *_ = engine.meta_gradient(0.1, TaskBatch(x, y, x, y))
    with fm.use_backend("torch"):
        expected, *_ = engine.meta_gradient(0.1, TaskBatch(x, y, x, y))
    torch.testing.assert_close(loss, expected)


class Activations(nn.Module):
    """By name and by position, in place too; and a loop that the program does not lower."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

    def forward(self, x):
        x = F.gelu(self.layers[0](x), approximate="tanh")
        x = F.softplus(self.layers[1](x), 2.0, threshold=0.4)
        x = F.mish(input=self.layers[2](x))
        x = F.silu(F.gelu(self.layers[3](x)), inplace=True).sin()
        return F.silu(x)


@pytest.mark.parametrize("mode", ["reverse", "forward"])
@pytest.mark.parametrize("tasks", [1, 3])
def test_activations_are_routed_with_and_without_vmap(tasks, mode, device, monkeypatch):
    torch.manual_seed(5)
    net = Activations().double().to(device)
    x, y = torch.randn(2, tasks, 5, 6, dtype=torch.float64, device=device)
    engine = FunctionalEngine(net, F.mse_loss, InnerLoopOptions(steps=2, hvp_mode=mode))
    made = []

    def counted(x, kind, **numbers):
        made.append(kind)
        return fm.activation(x, kind, **numbers)

    monkeypatch.setattr(_routing, "activation", counted)
    found = engine.meta_gradient(0.1, TaskBatch(x, y, x.cos(), y))
    assert made[:5] == ["gelu_tanh", "softplus", "mish", "gelu", "silu"]  # not the one in place
    made.clear()
    with fm.use_backend("torch"):
        expected = engine.meta_gradient(0.1, TaskBatch(x, y, x.cos(), y))
    assert not made
    torch.testing.assert_close(found.grads, expected.grads, rtol=1e-10, atol=1e-12)
