"""Weights of examples, and absent examples, in compiled task programs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastmeta.ops.task_program import COMPILED, NAMES, reference
from tests.helpers.program_checks import Setting, check, kernels, results
from tests.helpers.programs import CLASS_LOSSES, LOSSES

__all__ = ["kernels"]  # a fixture of every test here

OPS = NAMES[1:]  # all that have a loss
EXACT = 1e-10

each_number_of_tasks = pytest.mark.parametrize("tasks", [3, 20])


@each_number_of_tasks
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("op", OPS)
def test_weights(op, loss, tasks, device):
    Setting("tanh", loss, device, tasks=tasks, weighs=True).check(op)


@pytest.mark.parametrize("name", ["layer_norm", "tied", "residual", "group_norm", "heads"])
@pytest.mark.parametrize("op", OPS)
def test_weights_of_other_networks(op, name, device):
    Setting(name, "mse", device, torch.float32, weighs=True, half="second").check(op)
    setting = Setting(name, "cross_entropy", device, weighs=True, per_task=True)
    setting.check(op)


@pytest.mark.parametrize("tasks", [1, 20])
def test_weights_with_all_options_of_a_meta_gradient(tasks, device):
    setting = Setting("silu", "label_smoothing", device, tasks=tasks, steps=3, weighs=True)
    for keep in (False, True):
        for first_order in (False, True):
            options = {"first_order": first_order, "keep": keep, "weights": (0.2, 0.0, 0.5)}
            setting.check("meta_gradient", **options)
            setting.check("adapt_backward", first_order=first_order, keep=keep)
    setting.check("products", gauss_newton=True)


@each_number_of_tasks
@pytest.mark.parametrize("loss", CLASS_LOSSES)
@pytest.mark.parametrize("op", OPS)
def test_absent_examples(op, loss, tasks, device):
    setting = Setting("tanh", loss, device, tasks=tasks)
    setting.mark_absent()
    setting.check(op)
    setting = Setting("group_norm", loss, device, tasks=tasks, weighs=True)
    setting.mark_absent()
    setting.check(op)


@each_number_of_tasks
def test_absent_examples_are_as_if_they_were_not_there(tasks, device):
    setting = Setting("gelu", "cross_entropy", device, tasks=tasks, support=6)
    setting.data.support_y[:, 2] = -1
    loss, outputs, grads, to_x = COMPILED.gradient(*setting.arguments("gradient"))
    there = [0, 1, 3, 4, 5]
    x, y = (part[:, there].contiguous() for part in setting.data[:2])
    found = COMPILED.gradient(*setting.raw, x, y, True)
    for actual, expected in zip(
        (loss, outputs[:, there], grads, to_x[:, there]), found, strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=EXACT, atol=EXACT)
    assert not to_x[:, 2].any()


@each_number_of_tasks
def test_a_task_without_examples_has_no_loss_and_one_of_ignored_ones_none_that_is_a_number(
    tasks, device
):
    setting = Setting("tanh", "cross_entropy", device, tasks=tasks)
    setting.data.support_y[0], setting.data.support_y[1] = -1, -100
    setting.data.support_y[2] = torch.tensor([-1, -1, -1, -100])
    loss, _, grads, _ = COMPILED.gradient(*setting.arguments("gradient"))
    assert loss[0] == 0 and not grads[0].any()
    assert loss.isnan().tolist() == [t in (1, 2) for t in range(tasks)]
    expected = reference.gradient(*setting.arguments("gradient"))[0]
    assert torch.equal(expected.isnan(), loss.isnan()) and expected[0] == 0


@each_number_of_tasks
def test_a_weight_of_zero_leaves_infinite_outputs_out(tasks, device):
    setting = Setting("tanh", "mse", device, tasks=tasks, weighs=True)
    setting.data.support_y[0, 1] = torch.inf
    setting.weights[0][0, 1] = 0
    loss, _, grads, to_x = COMPILED.gradient(*setting.arguments("gradient"))
    assert loss.isfinite().all() and grads.isfinite().all() and not to_x[0, 1].any()


def test_weights_that_tasks_share_and_weights_with_strides(device):
    setting = Setting("tanh", "mse", device, weighs=True)
    own = setting.weights[0][:1].contiguous()
    x, y = setting.data[:2]
    for weight in (own.expand(3, -1), torch.stack([own, own], -1)[..., 0].expand(3, -1)):
        check("gradient", *setting.raw, x, y, True, weight)


@pytest.mark.parametrize("op", OPS)
def test_a_program_with_a_batch_norm_takes_neither(op, device):
    setting = Setting("batch_norm", "cross_entropy", device, weighs=True)
    with pytest.raises(ValueError, match="weight: expected none for a program with a batch norm"):
        results(op, setting.arguments(op))
    setting.weights = ()
    setting.data.support_y[0, 1] = -1
    message = "y: expected labels in 0..2, as the module gives 3 outputs, got -1"
    with pytest.raises(ValueError, match=message):
        results(op, setting.arguments(op))
    labels = setting.raw.code, setting.data.support_y, setting.data.query_y
    for functions in (COMPILED, reference):
        with pytest.raises(ValueError, match=f"support_{message}"):
            functions.check_labels(*labels)


@pytest.mark.parametrize("weight", [torch.ones(3, 5), torch.ones(4), torch.ones(3, 4).float()])
def test_weights_that_do_not_fit(weight, device):
    setting = Setting("tanh", "mse", device)
    fits = weight.shape == (3, 4)
    weight = weight.to(device) if fits else weight.to(device, torch.float64)
    with pytest.raises((RuntimeError, TypeError), match="query_weight"):
        COMPILED.gradient(*setting.arguments("gradient"), weight)


def unweighted(setting: Setting, op: str) -> tuple[Tensor, ...]:
    return results(op, setting.arguments(op))


@pytest.mark.parametrize("op", OPS)
def test_equal_weights_are_none(op, device):
    setting = Setting("elu", "huber", device)
    setting.generator.manual_seed(1)
    expected = unweighted(setting, op)
    setting.weights = tuple(
        torch.full(x.shape[:2], 1 / x.shape[1], dtype=x.dtype, device=device)
        for x in (setting.data.support_x, setting.data.query_x)
    )
    setting.generator.manual_seed(1)
    for actual, value in zip(results(op, setting.arguments(op)), expected, strict=True):
        torch.testing.assert_close(actual, value, rtol=EXACT, atol=EXACT)
