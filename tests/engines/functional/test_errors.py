"""What the functional engine refuses, and how it says so."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmeta.engines.base import Examples, InnerLoopOptions, TaskBatch
from fastmeta.engines.functional.engine import FunctionalEngine
from tests.helpers.engines import ERRORS
from tests.helpers.networks import Tasks, build, classification, regression, regressor


def gradients(module: nn.Module, tasks: Tasks, loss=F.cross_entropy, **options) -> Tensor:
    engine = FunctionalEngine(module, loss, InnerLoopOptions(**options))
    theta = engine.parameters()
    return torch.autograd.grad(engine.meta_loss(theta, 0.1, TaskBatch(*tasks))[0], theta)[0]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS)
def test_bad_data_is_named(change, error, message, device):
    ((name, value),) = change.items()
    net, tasks = build("mlp", device), classification("mlp", device)
    if isinstance(value, tuple):
        value = torch.zeros(value, dtype=torch.float64, device=device)
    elif callable(value):
        value = value(getattr(tasks, name))
    with pytest.raises(error, match=message.replace("DEVICE", str(tasks.query_x.device))):
        gradients(net, tasks._replace(**{name: value}))


def test_ignored_labels_are_no_error(device):
    tasks = classification("mlp", device)
    tasks.support_y[:, 0] = -100
    assert gradients(build("mlp", device), tasks).isfinite().all()


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (nn.MSELoss(reduction="none"), r"loss: expected a scalar tensor, .* got \[6, 1\]"),
        (lambda outputs, y: 1.0, "loss: expected a scalar tensor, .* got float"),
    ],
)
def test_a_loss_that_is_no_scalar_is_refused(loss, message, device):
    with pytest.raises(ValueError, match=message):
        gradients(regressor(device), regression(device), loss)


def test_a_loss_of_one_tensor_refuses_several_outputs(device):
    class Pair(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, super().forward(x)

    with pytest.raises(TypeError, match=r"loss: .* takes one tensor, and the module gives a tuple"):
        gradients(Pair(3, 4).double().to(device), classification("mlp", device))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": -1}, ValueError, "steps: expected at least 0, got -1"),
        ({"steps": 1.0}, TypeError, "steps: expected an integer, got 1.0"),
        ({"task_chunk": 0}, ValueError, "task_chunk: expected at least 1, got 0"),
        ({"first_order": 1}, TypeError, "first_order: expected a bool, got 1"),
        ({"hvp_mode": "exact"}, ValueError, "hvp_mode: expected one of"),
        ({"loss": None}, TypeError, "loss: expected a callable, got NoneType"),
    ],
)
def test_bad_options_are_named(options, error, message, device):
    with pytest.raises(error, match=message):
        gradients(build("mlp", device), classification("mlp", device), **options)


def test_wrong_starting_parameters_are_named(device):
    engine = FunctionalEngine(build("mlp", device), F.cross_entropy)
    tasks = classification("mlp", device)
    theta = engine.parameters()
    for wrong, error, message in (
        (0.0, TypeError, r"theta: expected a tensor, got float"),
        (theta[:82], ValueError, r"theta: .* \[83\] or \[3, 83\], got \[82\]"),
        (theta.float(), TypeError, r"theta: expected dtype torch.float64, got torch.float32"),
        (theta.to("meta"), ValueError, f"theta: expected device {theta.device}, got meta"),
    ):
        with pytest.raises(error, match=message):
            engine.adapt(wrong, 0.1, Examples(*tasks[:2]))


def test_inference_mode_is_refused_with_the_reason(device):
    engine = FunctionalEngine(build("mlp", device), F.cross_entropy)
    tasks = classification("mlp", device)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"use torch.no_grad\(\)"):
        engine.meta_loss(engine.parameters(), 0.1, TaskBatch(*tasks))
