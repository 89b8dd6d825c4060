"""Another batch of the support at each inner step, against an unrolled loop in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta as fm
from fastmeta.core.parameter_layout import ParameterLayout
from fastmeta.engines.base import Examples, InnerLoopOptions
from fastmeta.engines.functional.engine import FunctionalEngine
from fastmeta.engines.minibatches import read_minibatches
from tests.helpers.engines import step_sizes
from tests.helpers.inner_batches import (
    FORMS,
    B,
    S,
    Supports,
    T,
    supports,
    unrolled_loss,
    vmapped_loss,
)
from tests.helpers.learners import engine
from tests.helpers.memory import peak_bytes
from tests.helpers.networks import build, classification, regression, regressor, relative_error
from tests.helpers.program_checks import skip_without_program
from tests.helpers.unrolled_rules import CASES

__all__ = ["engine"]  # a fixture

EXACT = 1e-10

each_form = pytest.mark.parametrize("form", FORMS)
each_order = pytest.mark.parametrize("first_order", [False, True])


def theta_of(net: nn.Module) -> Tensor:
    return ParameterLayout.of(net).flatten(dict(net.named_parameters())).detach()


def starts(net: nn.Module) -> Tensor:
    """Parameters of each task's own to start from ``[T, P]``."""
    theta = theta_of(net)
    return theta + 0.1 * torch.arange(T, device=theta.device).unsqueeze(1) * theta.cos()


def assert_same(loss: Tensor, expected: Tensor, sources: list[Tensor]) -> None:
    """The losses and their gradients; a gradient that nothing reaches may be None or zero."""
    wanted = torch.autograd.grad(expected, sources, allow_unused=True, retain_graph=True)
    found = torch.autograd.grad(loss, sources, allow_unused=True)
    assert relative_error(loss, expected) < EXACT
    for a, e in zip(found, wanted, strict=True):
        assert (e is None and (a is None or not a.any())) or relative_error(a, e) < EXACT


@each_form
@each_order
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
def test_all_gradients_equal_an_unrolled_loop(form, first_order, steps, engine, device):
    net, batch = build("mlp", device), supports(form, steps, device)
    lr, start = nn.Parameter(step_sizes(net, steps, 83)), starts(net).requires_grad_()
    batch.x.requires_grad_()
    batch.query_x.requires_grad_()
    maml = fm.MAML(net, lr, steps, first_order, engine=engine)
    loss, _ = maml.meta_loss(*batch.data, start=start, inner_batches=batch.inner_batches)
    expected, adapted = unrolled_loss(net, start, lr, batch, steps, first_order=first_order)
    # To first order the support reaches nothing: the gradient is cut at g_k.
    assert_same(loss, expected, [start, lr, batch.query_x, batch.x])
    found = maml.adapt_tasks(*batch.data[:2], start=start, inner_batches=batch.inner_batches)
    assert relative_error(found.params, adapted) < EXACT
    assert_same(found.params.cos().sum(), adapted.cos().sum(), [start, lr, batch.x])


@each_form
@each_order
@pytest.mark.parametrize("rule", ["momentum", "adam", "clip_norm", "carried_adam"])
def test_rules_and_their_hyperparameters(form, first_order, rule, engine, device):
    net, batch = build("mlp", device), supports(form, 4, device)
    case, lr = CASES[rule](net), nn.Parameter(step_sizes(net))
    case.rule.to(device)
    batch.x.requires_grad_()
    maml = fm.MAML(net, lr, 4, first_order, rule=case.rule, engine=engine)
    theta = theta_of(net).requires_grad_()
    loss, _ = maml.meta_loss(*batch.data, start=theta, inner_batches=batch.inner_batches)
    expected, _ = unrolled_loss(net, theta, lr, batch, 4, case.update, first_order)
    assert_same(loss, expected, [theta, lr, batch.x, *case.learned.values()])


@each_form
@pytest.mark.parametrize("chunk", [1, 2])
@pytest.mark.parametrize("name", ["mlp", "conv4"])
def test_chunks_of_tasks(form, chunk, name, engine, device):
    net, batch = build(name, device), supports(form, 3, device, name)
    batch.x.requires_grad_()
    theta, lr = theta_of(net).requires_grad_(), torch.tensor(0.1, dtype=torch.float64).to(device)
    maml = fm.MAML(net, lr, 3, engine=engine, task_chunk=chunk)
    expected, adapted = unrolled_loss(net, theta, lr, batch, 3)
    loss, _ = maml.meta_loss(*batch.data, start=theta, inner_batches=batch.inner_batches)
    assert_same(loss, expected, [theta, batch.x])
    found = maml.adapt_tasks(*batch.data[:2], start=theta, inner_batches=batch.inner_batches)
    assert_same(found.params.cos().sum(), adapted.cos().sum(), [theta, batch.x])


@each_form
@pytest.mark.parametrize("name", ["conv4", "residual", "gru", "attention"])
def test_norms_and_other_networks(form, name, device):
    """A batch norm takes the statistics of the step's batch."""
    net, batch = build(name, device), supports(form, 2, device, name)
    batch.x.requires_grad_()
    theta, lr = theta_of(net).requires_grad_(), torch.tensor(0.1, dtype=torch.float64).to(device)
    expected, _ = unrolled_loss(net, theta, lr, batch, 2)
    for which in ("functional", "auto"):
        maml = fm.MAML(net, 0.1, 2, engine=which)
        loss, _ = maml.meta_loss(*batch.data, start=theta, inner_batches=batch.inner_batches)
        assert_same(loss, expected, [theta, batch.x])


@each_form
@pytest.mark.parametrize("which", ["functional", "auto"])
def test_weights_make_up_a_mean_of_each_batch(form, which, device):
    net, batch = build("mlp", device), supports(form, 3, device)
    shape = (T, 3, B) if form == "per_step" else (T, S)
    batch.weight = torch.rand(shape, dtype=torch.float64).to(device).requires_grad_()
    batch.x.requires_grad_()
    theta, lr = theta_of(net).requires_grad_(), torch.tensor(0.1, dtype=torch.float64).to(device)
    maml = fm.MAML(net, 0.1, 3, engine=which, rule=fm.rules.SGD())
    given = {"support_weight": batch.weight, "inner_batches": batch.inner_batches}
    loss, _ = maml.meta_loss(*batch.data, start=theta, **given)
    expected, adapted = unrolled_loss(net, theta, lr, batch, 3)
    assert_same(loss, expected, [theta, batch.x, batch.weight])
    found = maml.adapt_tasks(*batch.data[:2], start=theta, **given).params
    assert_same(found.cos().sum(), adapted.cos().sum(), [theta, batch.x, batch.weight])


@each_form
def test_absent_examples_are_left_out_of_their_batch(form, device):
    net, batch = build("conv4", device), supports(form, 3, device, "conv4")
    maml = fm.MAML(net, 0.1, 3)
    weight = torch.ones(batch.y.shape, dtype=torch.float64, device=device)
    ones = {"support_weight": weight, "inner_batches": batch.inner_batches}
    whole = maml.meta_gradient(*batch.data, **ones)
    unweighted = maml.meta_gradient(*batch.data, inner_batches=batch.inner_batches)
    assert relative_error(whole.grads, unweighted.grads) < EXACT
    # An example that some step sees.
    at = 2 if form == "per_step" else int(batch.inner_batches.flatten()[0])
    batch.y[..., at] = -1  # no class
    found = maml.meta_gradient(*batch.data, **ones)
    weight[..., at] = 0
    batch.y[..., at] = 3
    batch.x[..., at, :, :, :] = 50.0
    assert relative_error(found.grads, maml.meta_gradient(*batch.data, **ones).grads) < EXACT
    assert relative_error(found.grads, whole.grads) > 1e-3


def test_weights_that_are_not_normalized_count_the_examples_of_the_batch(device):
    net, batch = build("mlp", device), supports("shared", 2, device)
    maml = fm.MAML(net, 0.1, 2, normalize_weights=False)
    weight = torch.ones(T, S, dtype=torch.float64, device=device)
    given = {"inner_batches": batch.inner_batches}
    expected = maml.meta_gradient(*batch.data, **given).grads
    found = maml.meta_gradient(*batch.data, support_weight=weight, **given).grads
    assert relative_error(found, expected) < EXACT


@each_form
def test_dropout_draws_the_masks_of_the_unrolled_loop(form, device):
    torch.manual_seed(0)
    layers = [nn.Linear(3, 8), nn.Dropout(0.4), nn.Tanh(), nn.Linear(8, 4)]
    net, batch = nn.Sequential(*layers).double().to(device), supports(form, 4, device)
    batch.x.requires_grad_()
    theta = theta_of(net).requires_grad_()
    torch.manual_seed(5)
    expected = vmapped_loss(net, theta, 0.1, batch, 4)
    for memory in ("auto", "recompute", "segments"):
        torch.manual_seed(5)
        maml = fm.MAML(net, 0.1, 4, memory=memory, task_chunk=None)
        loss, _ = maml.meta_loss(*batch.data, start=theta, inner_batches=batch.inner_batches)
        wanted = torch.autograd.grad(expected, [theta, batch.x], retain_graph=True)
        found = torch.autograd.grad(loss, [theta, batch.x])
        for a, e in zip(found, wanted, strict=True):
            assert relative_error(a, e) < EXACT


@each_form
def test_losses_of_every_step(form, engine, device):
    net, batch, weights = build("mlp", device), supports(form, 3, device), [0.5, 0.0, 2.0]
    theta, lr = theta_of(net).requires_grad_(), torch.tensor(0.1, dtype=torch.float64).to(device)
    maml = fm.MAML(net, 0.1, 3, engine=engine)
    loss, _ = maml.meta_loss(*batch.data, weights, start=theta, inner_batches=batch.inner_batches)
    expected, _ = unrolled_loss(net, theta, lr, batch, 3, step_weights=weights)
    assert_same(loss, expected, [theta])


@each_form
def test_values_losses_of_each_task_and_compiled_calls(form, engine, device):
    net, batch = build("mlp", device), supports(form, 3, device)
    maml = fm.MAML(net, nn.Parameter(torch.tensor(0.1, dtype=torch.float64)), 3, engine=engine)
    maml.to(device)
    given = {"inner_batches": batch.inner_batches}
    loss, outputs = maml.meta_loss(*batch.data, **given)
    loss.backward()
    value = maml.meta_gradient(*batch.data, **given)
    assert relative_error(value.outputs, outputs) < EXACT
    grads = torch.cat([p.grad.flatten() for p in net.parameters()])
    assert relative_error(value.grads, grads) < EXACT
    assert relative_error(value.lr_grad, maml.lr.grad) < EXACT
    each = maml.task_gradients(*batch.data, **given)
    assert relative_error(each.mean(0), grads) < EXACT
    losses, _ = maml.meta_loss(*batch.data, **given, reduction="none")
    assert losses.shape == (T,)
    assert relative_error(losses.mean(), loss) < EXACT


def test_equal_batches_are_the_support_at_every_step(engine, device):
    """And calls before, with which a fast path was prepared, have no part in the result."""
    net, tasks = build("mlp", device), classification("mlp", device)
    maml = fm.MAML(net, 0.1, 3, engine=engine)
    whole = [maml.meta_gradient(*tasks) for _ in range(4)][-1]
    rows = torch.arange(6, device=device).expand(3, 6)
    found = maml.meta_gradient(*tasks, inner_batches=rows)
    assert relative_error(found.grads, whole.grads) < EXACT
    rows = torch.tensor([[0, 1], [2, 3], [4, 5]], device=device)
    part = maml.meta_gradient(*tasks, inner_batches=rows)
    assert relative_error(part.grads, whole.grads) > 1e-6
    loss, _ = maml.meta_loss(*tasks, inner_batches=rows)
    assert relative_error(loss, part.loss) < EXACT
    repeated = [x.unsqueeze(1).expand(-1, 3, *x.shape[1:]) for x in tasks[:2]]
    found = maml.meta_gradient(*repeated, *tasks[2:], inner_batches="per_step")
    assert relative_error(found.grads, whole.grads) < EXACT


def test_auto_takes_the_program(device, monkeypatch):
    skip_without_program(device)
    net, batch = build("mlp", device), supports("per_step", 3, device)
    maml = fm.MAML(net, 0.1, 3)

    def refuse(*_: object) -> None:
        raise AssertionError("expected the program")

    monkeypatch.setattr(FunctionalEngine, "meta_loss", refuse)
    monkeypatch.setattr(FunctionalEngine, "adapt", refuse)
    maml.meta_gradient(*batch.data, inner_batches="per_step")
    maml.adapt_tasks(*batch.data[:2], inner_batches="per_step")


def test_a_norm_of_one_example_has_no_program(device):
    """The support has six examples, and each step sees one of them."""
    net, tasks = build("mlp", device), classification("mlp", device)
    net = nn.Sequential(net, nn.BatchNorm1d(4).double().to(device))
    rows = torch.tensor([[0], [1]], device=device)
    for which in ("program", "functional", "auto"):
        maml = fm.MAML(net, 0.1, 2, engine=which)
        with pytest.raises(ValueError, match=r"one example|more than 1 value per channel"):
            maml.meta_loss(*tasks, inner_batches=rows)


def test_required_graphs_are_refused(device):
    net, batch = build("mlp", device), supports("per_step", 3, device)
    maml = fm.MAML(net, 0.1, 3, cuda_graph=True)
    with pytest.raises(ValueError, match="cuda_graph=True: each inner step sees another batch"):
        maml.meta_loss(*batch.data, inner_batches="per_step")


def test_derivatives_pass_gradcheck(device):
    net, tasks = regressor(device), regression(device, tasks=2, examples=4)
    options = InnerLoopOptions(2, rule=fm.rules.SGD(0.5))
    loop = FunctionalEngine(net, F.mse_loss, options)
    rows = torch.tensor([[[0, 1, 1], [3, 2, 0]], [[2, 2, 2], [1, 3, 0]]], device=device)
    inputs = [loop.parameters().detach(), *tasks[:2]]
    inputs = [tensor.requires_grad_() for tensor in inputs]

    def adapted(p: Tensor, x: Tensor, y: Tensor) -> Tensor:
        support = Examples(x, y)
        return loop.adapt(p, 0.1, support, read_minibatches(rows, 2, support))

    assert torch.autograd.gradcheck(adapted, inputs)


def test_supports_in_any_order_of_memory(engine, device):
    """Also one whose gradient, in its order of memory, could not be a view of rows."""
    net, given = build("mlp", device), supports("own", 3, device)
    turned = given.x.transpose(0, 1).contiguous().transpose(0, 1)
    grads = []
    for x in (given.x, turned):
        x.requires_grad_()
        maml = fm.MAML(net, 0.1, 3, engine=engine)
        data = x, *given.data[1:]
        loss, _ = maml.meta_loss(*data, inner_batches=given.inner_batches)
        grads.append(torch.autograd.grad(loss, x)[0])
    assert relative_error(grads[1], grads[0]) < EXACT


def test_indices_that_were_changed_before_the_backward(device):
    net, batch = build("mlp", device), supports("shared", 2, device)
    batch.x.requires_grad_()
    adapted = fm.MAML(net, 0.1, 2, engine="functional").adapt_tasks(
        *batch.data[:2], inner_batches=batch.inner_batches
    )
    batch.inner_batches.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        adapted.params.sum().backward()


def test_learners_and_numbers_of_steps(device):
    net, batch = build("mlp", device), supports("per_step", 2, device)
    maml = fm.MAML(net, 0.1, 5)
    found = maml.adapt_tasks(*batch.data[:2], steps=2, inner_batches="per_step").params
    two = fm.MAML(net, 0.1, 2).adapt_tasks(*batch.data[:2], inner_batches="per_step").params
    assert torch.equal(found, two)
    plus = fm.MAMLPlusPlus(copy.deepcopy(net), 0.1, 2, first_order_iterations=0)
    weights = plus.step_weights()
    expected = fm.MAML(net, 0.1, 2).meta_gradient(*batch.data, weights, inner_batches="per_step")
    loss, _ = plus.meta_loss(*batch.data, inner_batches="per_step")
    assert relative_error(loss, expected.loss) < EXACT
    plus.iteration = 0
    value = plus.meta_gradient(*batch.data, inner_batches="per_step")
    assert relative_error(value.grads, expected.grads) < EXACT


@pytest.mark.parametrize("form", ["per_step", "own"])
def test_no_more_than_a_batch_is_copied(form):
    """K batches of 300 KB: memory grows by the parameters of each step only."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(2500, 2))
    peaks = []
    for steps in (4, 16):
        y = torch.zeros(T, steps, 10, dtype=torch.int64)
        x = torch.randn(T, steps, 10, 1, 50, 50)
        query_x, query_y = torch.randn(T, 1, 1, 50, 50), torch.zeros(T, 1, dtype=torch.int64)
        batch = Supports(x, y, query_x, query_y, "per_step")
        if form == "own":
            rows = torch.arange(10 * steps).view(1, steps, 10).expand(T, -1, -1).contiguous()
            batch = Supports(x.flatten(1, 2), y.flatten(1, 2), query_x, query_y, rows)
        maml = fm.MAML(net, 0.01, steps, engine="functional", memory="recompute", task_chunk=None)

        def call(maml=maml, batch=batch) -> None:
            maml.meta_gradient(*batch.data, inner_batches=batch.inner_batches)

        call()
        peaks.append(peak_bytes(call))
    theta = 4 * T * 5002
    assert peaks[1] - peaks[0] < 1.05 * 12 * theta < 4 * x.numel() / 2


def expect(message: str, error: type[Exception] = ValueError, **options: object):
    return pytest.param(options, error, message, id=message[:40])


ROWS = torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        expect("inner_batches: expected an int64 tensor or 'per_step', got list", TypeError,
               inner_batches=[[0], [1]]),
        expect("inner_batches: expected an int64 tensor .*, got torch.float32", TypeError,
               inner_batches=ROWS.float()),
        expect(r"inner_batches: expected shape \[K, B\] or \[T, K, B\] with T = 3, K = 2",
               inner_batches=ROWS.T),
        expect(r"inner_batches: expected shape .*, got \[2, 0\]", inner_batches=ROWS[:, :0]),
        expect(r"inner_batches: expected shape .*, got \[3\]", inner_batches=ROWS[0]),
        expect(r"inner_batches: expected shape .*, got \[4, 2, 3\]",
               inner_batches=ROWS.expand(4, 2, 3)),
        expect("inner_batches: expected examples from 0 to 5, got 0 to 6",
               inner_batches=ROWS + torch.tensor([0, 0, 6])),
        expect("inner_batches: expected examples from 0 to 5, got -1 to 0",
               inner_batches=ROWS - torch.tensor([0, 0, 1])),
        expect("inner_batches: expected indices or 'per_step', got 'steps'", inner_batches="steps"),
        expect(r"support_x: expected shape \[T, 2, B, ...\], a batch for each .*, got \[3, 6\]",
               inner_batches="per_step", x=lambda x: x[..., 0]),
        expect(r"support_x: expected shape \[3, 2, 3, ...\], .*, got \[3, 6, 3\]",
               inner_batches="per_step"),
        expect(r"support_y: expected shape \[3, 2, 3, ...\], .*, got \[3, 6\]",
               inner_batches="per_step", x=lambda x: x[:, :2]),
        expect(r"support_y: expected shape \[3, 2, 1, ...\], .*, got \[3, 2, 3\]",
               inner_batches="per_step", x=lambda x: x.view(3, 2, 3, 3)[:, :, :1],
               y=lambda y: y.view(3, 2, 3)),
        expect(r"support_x: expected shape \[3, 2, 0, ...\], .*, got \[3, 2, 0, 3\]",
               inner_batches="per_step", x=lambda x: x.view(3, 2, 3, 3)[:, :, :0],
               y=lambda y: y.view(3, 2, 3)[:, :, :0]),
        expect(r"support_y: expected shape \[3, 6, ...\], got \[3, 5\]",
               inner_batches=ROWS, y=lambda y: y[:, :5]),
        expect("support_x: expected a tensor, got NoneType", TypeError,
               inner_batches=ROWS, x=lambda x: None),
        expect("support_x: expected dtype torch.float64", TypeError,
               inner_batches="per_step", x=lambda x: x.view(3, 2, 3, 3).float(),
               y=lambda y: y.view(3, 2, 3)),
        expect("support_y: expected labels in 0..3.* 4",
               inner_batches=ROWS, y=lambda y: torch.full_like(y, 4)),
        expect(r"support_weight: expected shape \[3, 2, 3\], got \[3, 6\]",
               inner_batches="per_step", x=lambda x: x.view(3, 2, 3, 3),
               y=lambda y: y.view(3, 2, 3), support_weight=torch.ones(3, 6)),
        expect(r"support_weight: expected shape \[3, 6\], got \[3, 2, 3\]",
               inner_batches=ROWS, support_weight=torch.ones(3, 2, 3)),
        expect("inner_batches: expected None, as there are no steps", inner_batches=ROWS, steps=0),
    ],
)  # fmt: skip
def test_bad_batches_are_named(options, error, message, engine, device):
    net, tasks = build("mlp", device), classification("mlp", device)
    options = dict(options)
    x = options.pop("x", lambda x: x)(tasks.support_x)
    y = options.pop("y", lambda y: y)(tasks.support_y)
    maml = fm.MAML(net, 0.1, options.pop("steps", 2), engine=engine)
    for call in (
        lambda: maml.meta_loss(x, y, *tasks[2:], **options),
        lambda: maml.meta_loss(x, y, *tasks[2:], **options, reduction="none"),
        lambda: maml.meta_gradient(x, y, *tasks[2:], **options),
        lambda: maml.adapt_tasks(x, y, **options),
    ):
        with pytest.raises(error, match=message):
            call()


def test_a_support_with_a_dimension_of_steps_is_no_batch_by_itself(device):
    """Images without the switch stay images: nothing guesses from the shape."""
    net, batch = build("conv4", device), supports("per_step", 3, device, "conv4")
    with pytest.raises((ValueError, RuntimeError)):
        fm.MAML(net, 0.1, 3).meta_loss(*batch.data)


@each_form
def test_calls_inside_torch_compile(form, device):
    net, batch = build("mlp", device), supports(form, 2, device)
    maml = fm.MAML(net, 0.1, 2)
    expected, _ = maml.meta_loss(*batch.data, inner_batches=batch.inner_batches)

    @torch.compile(backend="eager")
    def step(*data: Tensor) -> Tensor:
        return maml.meta_loss(*data, inner_batches=batch.inner_batches)[0] * 1

    assert relative_error(step(*batch.data), expected) < EXACT
