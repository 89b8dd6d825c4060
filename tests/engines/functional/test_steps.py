"""What differs from step to step in the functional engine: step sizes and query losses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmeta.engines.base import Examples, InnerLoopOptions, TaskBatch
from fastmeta.engines.functional.engine import FunctionalEngine
from tests.helpers.engines import assert_equal, run, step_sizes
from tests.helpers.networks import (
    NETWORKS,
    Tasks,
    build,
    classification,
    regression,
    regressor,
    relative_error,
)
from tests.helpers.unrolled import meta_gradient

TASKS, PARAMETERS, ELEMENTS = 3, 6, 83  # of "mlp" and its tasks
WEIGHTS = [0.25, -0.5, 1.5, 0.125, 0.75]

each_order = pytest.mark.parametrize("first_order", [False, True])


@each_order
@pytest.mark.parametrize("tasks", [1, TASKS])
@pytest.mark.parametrize("width", [1, PARAMETERS, ELEMENTS])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
def test_step_sizes_of_every_step(steps, width, tasks, first_order, device):
    net, data = build("mlp", device), classification("mlp", device)
    lr = step_sizes(net, steps, tasks, width)
    expected = meta_gradient(net, data, F.cross_entropy, lr, steps, first_order)
    assert_equal(run(net, data, lr, steps=steps, first_order=first_order), expected)


@pytest.mark.parametrize("shape", [(1, TASKS, 1), (1, 1, ELEMENTS), (1, TASKS, PARAMETERS)])
def test_one_matrix_may_serve_all_steps(shape, device):
    net, data = build("mlp", device), classification("mlp", device)
    lr = step_sizes(net, *shape)
    expected = meta_gradient(net, data, F.cross_entropy, lr, 3)
    assert_equal(run(net, data, lr, steps=3), expected)


@pytest.mark.parametrize("chunk", [1, 2])
@pytest.mark.parametrize("tasks", [1, TASKS])
def test_step_sizes_and_query_losses_of_every_step_in_chunks(tasks, chunk, device):
    net, data = build("mlp", device), classification("mlp", device)
    lr, weights = step_sizes(net, 3, tasks, ELEMENTS), WEIGHTS[:3]
    expected = meta_gradient(net, data, F.cross_entropy, lr, 3, step_weights=weights)
    assert_equal(run(net, data, lr, step_weights=weights, steps=3, task_chunk=chunk), expected)


@each_order
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
def test_query_losses_of_every_step(steps, first_order, device):
    net, data = build("mlp", device), classification("mlp", device)
    lr, weights = step_sizes(net), WEIGHTS[:steps]
    expected = meta_gradient(net, data, F.cross_entropy, lr, steps, first_order, weights)
    assert_equal(
        run(net, data, lr, step_weights=weights, steps=steps, first_order=first_order), expected
    )


@each_order
@pytest.mark.parametrize("name", NETWORKS)
def test_query_losses_of_every_network(name, first_order, device):
    net, data = build(name, device), classification(name, device)
    lr, weights = step_sizes(net, 2, 1, 1), WEIGHTS[:2]
    expected = meta_gradient(net, data, F.cross_entropy, lr, 2, first_order, weights)
    assert_equal(
        run(net, data, lr, step_weights=weights, steps=2, first_order=first_order), expected
    )


@each_order
@pytest.mark.parametrize("weights", [[0, 0.5, 0], [0.5, 0, 0], [0, 0, 0.5], [1, 0, 1]])
def test_weights_of_zero(weights, first_order, device):
    net, data = build("mlp", device), classification("mlp", device)
    lr = step_sizes(net, 3, 1, ELEMENTS)
    expected = meta_gradient(net, data, F.cross_entropy, lr, 3, first_order, weights)
    assert_equal(
        run(net, data, lr, step_weights=weights, steps=3, first_order=first_order), expected
    )


@each_order
def test_weights_that_are_all_zero_give_no_gradient(first_order, device):
    net, data = build("mlp", device), classification("mlp", device)
    actual = run(net, data, step_sizes(net), step_weights=[0, 0], steps=2, first_order=first_order)
    assert actual.loss == 0
    assert torch.equal(actual.logits, run(net, data, step_sizes(net), steps=2).logits)
    assert not any(grad.any() for grad in [*actual.params.values(), actual.lr, actual.query_x])


def test_the_last_steps_weight_alone_is_the_meta_loss(device):
    net, data = build("mlp", device), classification("mlp", device)
    expected = run(net, data, step_sizes(net), steps=3)
    weights = torch.tensor([0.0, 0.0, 1.0], device=device)
    assert_equal(run(net, data, step_sizes(net), step_weights=weights, steps=3), expected, 1e-300)


@each_order
@pytest.mark.parametrize(
    ("weights", "passes"),
    [
        ([0, 0, 1], [True]),
        ([1, 0, 1], [True, True]),
        ([1, 1, 0], [True, True, False]),
        ([0, 0, 0], [False]),
        (None, [True]),
    ],
)
def test_a_weight_of_zero_costs_no_query_pass(weights, passes, first_order, device):
    """Save the one without a gradient that gives the outputs at theta_K."""
    net, data = build("mlp", device), classification("mlp", device)
    with_gradient = []

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        if len(outputs) == data.query_x.shape[1]:
            with_gradient.append(torch.is_grad_enabled())
        return F.cross_entropy(outputs, y)

    engine = FunctionalEngine(net, loss, InnerLoopOptions(3, first_order))
    engine.meta_loss(engine.parameters(), 0.1, TaskBatch(*data), step_weights=weights)
    assert with_gradient == passes


def test_without_gradients_the_weighted_loss_is_the_same(device):
    net, data = build("mlp", device), classification("mlp", device)
    expected = run(net, data, step_sizes(net), step_weights=WEIGHTS, steps=5)
    engine = FunctionalEngine(net, F.cross_entropy, InnerLoopOptions(5))
    with torch.no_grad():
        loss, outputs = engine.meta_loss(
            engine.parameters(), step_sizes(net), TaskBatch(*data), step_weights=WEIGHTS
        )
    assert not loss.requires_grad
    assert torch.equal(loss, expected.loss)
    assert torch.equal(outputs, expected.logits)


def test_an_infinite_loss_of_no_weight_is_left_out(device):
    net, data = build("mlp", device), classification("mlp", device)
    engine = FunctionalEngine(
        net, lambda outputs, y: F.cross_entropy(outputs, y).exp(), InnerLoopOptions(2)
    )
    lr = torch.tensor([0.1, 1e200], dtype=torch.float64, device=device).reshape(2, 1, 1)
    with torch.no_grad():
        loss, _ = engine.meta_loss(
            engine.parameters(), lr, TaskBatch(*data), step_weights=[1.0, 0.0]
        )
        diverged, _ = engine.meta_loss(engine.parameters(), lr, TaskBatch(*data))
    assert loss.isfinite()
    assert not diverged.isfinite()


@each_order
def test_random_numbers_are_those_of_an_unrolled_loop(first_order, device):
    """Each step and each query pass draws masks of its own; the oracle's outputs, others again."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.4), nn.Linear(8, 4)).double().to(device)
    data = Tasks(*(tensor[:1] for tensor in classification("mlp", device)))
    lr, weights = step_sizes(net), [0.5, 1.0]
    torch.manual_seed(5)
    actual = run(net, data, lr, step_weights=weights, steps=2, first_order=first_order)
    torch.manual_seed(5)
    expected = meta_gradient(net, data, F.cross_entropy, lr, 2, first_order, weights)
    assert_equal(actual._replace(logits=expected.logits), expected)


@pytest.mark.rotating
@pytest.mark.parametrize("options", [{}, {"task_chunk": 1}, {"hvp_mode": "forward"}])
def test_all_derivatives_pass_gradcheck(options, device):
    net, data = regressor(device), regression(device, tasks=2, examples=2)
    engine = FunctionalEngine(net, F.mse_loss, InnerLoopOptions(steps=2, **options))
    inputs = [engine.parameters().detach(), step_sizes(net, 2, 2, 4), *data]
    inputs = [tensor.requires_grad_() for tensor in inputs]

    def meta_loss(theta: Tensor, lr: Tensor, *tensors: Tensor) -> Tensor:
        return engine.meta_loss(theta, lr, TaskBatch(*tensors), [0.75, 1.25])[0]

    def adapt(theta: Tensor, lr: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return engine.adapt(theta, lr, Examples(x, y))

    assert torch.autograd.gradcheck(meta_loss, inputs)
    assert torch.autograd.gradcheck(adapt, inputs[:4])


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ([1.0], ValueError, r"step_weights: expected 2 finite numbers, one a step, got \[1.0\]"),
        ([1.0, float("nan")], ValueError, r"step_weights: expected 2 .*, got \[1.0, nan\]"),
        ([1.0, float("inf")], ValueError, r"step_weights: expected 2 .*, got \[1.0, inf\]"),
        (torch.ones(3), ValueError, r"step_weights: expected 2 .*, got \[1.0, 1.0, 1.0\]"),
        (torch.ones(1, 2), ValueError, r"step_weights: expected 2 .*, got shape \[1, 2\]"),
        (0.5, TypeError, "step_weights: expected 2 .*, got 0.5"),
        ("ab", TypeError, "step_weights: expected 2 .*, got 'ab'"),
    ],
)
def test_bad_step_weights_are_named(weights, error, message):
    engine = FunctionalEngine(build("mlp", "cpu"), F.cross_entropy, InnerLoopOptions(2))
    data = classification("mlp", "cpu")
    with pytest.raises(error, match=message):
        engine.meta_loss(engine.parameters(), 0.1, TaskBatch(*data), step_weights=weights)


def test_step_weights_without_steps_are_refused():
    engine = FunctionalEngine(build("mlp", "cpu"), F.cross_entropy, InnerLoopOptions(0))
    data = classification("mlp", "cpu")
    with pytest.raises(ValueError, match="step_weights: expected None, as there are no steps"):
        engine.meta_loss(engine.parameters(), 0.1, TaskBatch(*data), step_weights=[])


def test_step_sizes_of_another_number_of_steps_are_refused():
    engine = FunctionalEngine(build("mlp", "cpu"), F.cross_entropy, InnerLoopOptions(2))
    lr = step_sizes(engine.module, 3, 1, 1)
    with pytest.raises(ValueError, match=r"lr: expected .* K = 2; got \[3, 1, 1\]"):
        engine.adapt(engine.parameters(), lr, Examples(*classification("mlp", "cpu")[:2]))


@pytest.mark.parametrize("options", [{}, {"hvp_mode": "forward"}, {"first_order": True}])
def test_a_number_is_taken_in_half_precision(options, device):
    net, data = build("mlp", device), classification("mlp", device)
    lr, weights = torch.tensor(0.1, dtype=torch.float64, device=device), [0.5, 1.0]
    first_order = "first_order" in options
    expected = meta_gradient(net, data, F.cross_entropy, lr, 2, first_order, weights)
    half = [t.bfloat16() if t.is_floating_point() else t for t in data]
    engine = FunctionalEngine(net.bfloat16(), F.cross_entropy, InnerLoopOptions(2, **options))
    engine.meta_loss(engine.parameters(), 0.1, TaskBatch(*half), step_weights=weights)[0].backward()
    for name, p in net.named_parameters():
        assert p.grad.dtype == torch.bfloat16
        assert relative_error(p.grad.double(), expected.params[name]) < 0.1
