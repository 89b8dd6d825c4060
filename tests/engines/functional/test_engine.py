"""The functional engine's meta-gradients against the unrolled graph."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta.engines.functional.passes
from benchmarks.memory.meta import peak
from fastmeta.core.parameter_layout import ParameterLayout
from fastmeta.engines.base import Examples, InnerLoopOptions, TaskBatch
from fastmeta.engines.functional.engine import FunctionalEngine
from tests.helpers.engines import EXACT, assert_equal, run, step_sizes
from tests.helpers.memory import peak_bytes
from tests.helpers.networks import (
    NETWORKS,
    Tasks,
    build,
    classification,
    regression,
    regressor,
    relative_error,
)
from tests.helpers.skips import skip_without_forward_derivative
from tests.helpers.unrolled import meta_gradient, vmapped_meta_loss


@pytest.mark.parametrize("steps", [1, 3, 5])
@pytest.mark.parametrize("name", NETWORKS)
def test_meta_gradient_equals_the_unrolled_one(name, steps, device):
    net, tasks = build(name, device), classification(name, device)
    lr = step_sizes(net)
    expected = meta_gradient(net, tasks, F.cross_entropy, lr, steps)
    assert_equal(run(net, tasks, lr, steps=steps), expected)


@pytest.mark.parametrize("steps", [1, 3, 5])
@pytest.mark.parametrize("name", NETWORKS)
def test_first_order_equals_the_unrolled_one(name, steps, device):
    net, tasks = build(name, device), classification(name, device)
    lr = step_sizes(net)
    expected = meta_gradient(net, tasks, F.cross_entropy, lr, steps, first_order=True)
    actual = run(net, tasks, lr, steps=steps, first_order=True)
    assert_equal(actual, expected)
    assert actual.support_x is None


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("shape", ["scalar", "layer", "element", "task and element"])
def test_gradient_of_every_form_of_step_size(shape, first_order, device):
    net, tasks = build("mlp", device), classification("mlp", device)
    layout = ParameterLayout.of(net)
    shapes = {
        "scalar": torch.tensor(0.07, dtype=torch.float64, device=device),
        "layer": step_sizes(net, len(layout.names)),
        "element": step_sizes(net),
        "task and element": step_sizes(net, 3, layout.numel),
    }
    lr = shapes[shape]
    expected = meta_gradient(net, tasks, F.cross_entropy, lr, 3, first_order)
    assert_equal(run(net, tasks, lr, steps=3, first_order=first_order), expected)


def test_a_step_size_per_task_gets_its_gradient(device):
    net, tasks = build("mlp", device), classification("mlp", device)
    lr = step_sizes(net, 3, 1)
    wide = lr.expand(3, ParameterLayout.of(net).numel).contiguous()
    expected = meta_gradient(net, tasks, F.cross_entropy, wide, 2)
    actual = run(net, tasks, lr, steps=2)
    assert relative_error(actual.lr, expected.lr.sum(1, keepdim=True)) < EXACT


@pytest.mark.parametrize("name", ["mlp", "conv4", "gru"])
@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_the_result_does_not_depend_on_the_chunk(name, chunk, device):
    net, tasks = build(name, device), classification(name, device)
    lr = step_sizes(net, 3, ParameterLayout.of(net).numel)
    expected = run(net, tasks, lr, steps=2)
    assert_equal(run(net, tasks, lr, steps=2, task_chunk=chunk), expected, 1e-13)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_large_query_set_is_taken_in_groups_of_tasks(name, device):
    net, tasks = build(name, device), classification(name, device, tasks=5, support=5, queries=40)
    lr = step_sizes(net)
    assert_equal(run(net, tasks, lr, steps=1), meta_gradient(net, tasks, F.cross_entropy, lr, 1))


@pytest.mark.parametrize("name", NETWORKS)
def test_forward_mode_gives_the_same_meta_gradient(name, device):
    skip_without_forward_derivative(name, "forward", device)
    net, tasks = build(name, device), classification(name, device)
    lr = step_sizes(net)
    expected = run(net, tasks, lr, steps=2)
    assert_equal(run(net, tasks, lr, steps=2, hvp_mode="forward"), expected)


def test_finite_differences_give_nearly_the_same_meta_gradient(device):
    net, tasks = build("attention", device), classification("attention", device)
    lr = step_sizes(net)
    expected = run(net, tasks, lr, steps=2)
    assert_equal(run(net, tasks, lr, steps=2, hvp_mode="finite_difference"), expected, 1e-6)


@pytest.mark.parametrize("options", [{}, {"task_chunk": 1}, {"hvp_mode": "forward"}])
def test_all_derivatives_pass_gradcheck(options, device):
    net, tasks = regressor(device), regression(device, tasks=2, examples=3)
    engine = FunctionalEngine(net, F.mse_loss, InnerLoopOptions(steps=2, **options))
    lr = torch.tensor(0.1, dtype=torch.float64, device=device)
    inputs = [engine.parameters().detach(), lr, *tasks]
    inputs = [tensor.requires_grad_() for tensor in inputs]

    def meta_loss(theta, lr, *tensors):
        return engine.meta_loss(theta, lr, TaskBatch(*tensors))[0]

    assert torch.autograd.gradcheck(meta_loss, inputs)


def test_adapted_parameters_pass_gradcheck(device):
    net, tasks = regressor(device), regression(device, tasks=2, examples=3)
    engine = FunctionalEngine(net, F.mse_loss, InnerLoopOptions(steps=2))
    theta = engine.parameters().detach()
    theta = theta + 0.1 * torch.randn(2, 25, dtype=torch.float64).to(device)
    inputs = [theta, torch.full_like(theta[:, :1], 0.1), *tasks[:2]]
    inputs = [tensor.requires_grad_() for tensor in inputs]

    def adapt(theta, lr, x, y):
        return engine.adapt(theta, lr, Examples(x, y))

    assert torch.autograd.gradcheck(adapt, inputs)


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("chunk", [None, 2])
def test_a_loss_on_adapted_parameters_gives_the_same_meta_gradient(chunk, first_order, device):
    net, tasks = build("conv4", device), classification("conv4", device)
    options = {"steps": 2, "first_order": first_order, "task_chunk": chunk}
    expected = run(net, tasks, step_sizes(net), **options)
    engine = FunctionalEngine(net, F.cross_entropy, InnerLoopOptions(**options))
    net.zero_grad()
    adapted = engine.adapt(engine.parameters(), step_sizes(net), Examples(*tasks[:2]))
    after = FunctionalEngine(net, F.cross_entropy, InnerLoopOptions(steps=0))
    after.meta_loss(adapted, 0.0, TaskBatch(*tasks))[0].backward()
    actual = {name: p.grad for name, p in net.named_parameters()}
    assert_equal(expected._replace(params=actual), expected)


def test_zero_steps_leave_the_parameters_alone(device):
    net, tasks = build("mlp", device), classification("mlp", device)
    engine = FunctionalEngine(net, F.cross_entropy, InnerLoopOptions(steps=0))
    adapted = engine.adapt(engine.parameters(), 0.1, Examples(*tasks[:2]))
    assert torch.equal(adapted, engine.parameters().expand(3, -1))
    lr = torch.tensor(0.1, dtype=torch.float64, device=device)
    expected = meta_gradient(net, tasks, F.cross_entropy, lr, 0)
    actual = run(net, tasks, lr, steps=0)
    assert relative_error(actual.query_x, expected.query_x) < EXACT
    assert not actual.lr.any()


def test_backward_scales_with_the_gradient_from_above(device):
    net, tasks = build("mlp", device), classification("mlp", device)
    once = run(net, tasks, step_sizes(net)).params["0.weight"].clone()
    engine = FunctionalEngine(net, F.cross_entropy)
    net.zero_grad()
    (-3 * engine.meta_loss(engine.parameters(), step_sizes(net), TaskBatch(*tasks))[0]).backward()
    assert relative_error(net[0].weight.grad, -3 * once) < EXACT


def test_backward_can_run_twice_over_a_kept_graph(device):
    net, tasks = build("mlp", device), classification("mlp", device)
    engine = FunctionalEngine(net, F.cross_entropy, InnerLoopOptions(steps=2))
    total = engine.adapt(engine.parameters(), 0.1, Examples(*tasks[:2])).sum()
    total.backward(retain_graph=True)
    first = net[0].weight.grad.clone()
    total.backward()
    assert torch.equal(net[0].weight.grad, 2 * first)


def test_a_second_derivative_of_the_meta_gradient_raises(device):
    net, tasks = build("mlp", device), classification("mlp", device)
    engine = FunctionalEngine(net, F.cross_entropy)
    theta = engine.parameters()
    for value in (
        engine.meta_loss(theta, 0.1, TaskBatch(*tasks))[0],
        engine.adapt(theta, 0.1, Examples(*tasks[:2])).sum(),
    ):
        grad = torch.autograd.grad(value, theta, create_graph=True)[0]
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            grad.sum().backward()


def test_without_gradients_nothing_but_the_loss_is_computed(monkeypatch, device):
    net, tasks = build("mlp", device), classification("mlp", device)
    expected = run(net, tasks, step_sizes(net), steps=2)
    monkeypatch.setattr(
        fastmeta.engines.functional.passes, "curvature", lambda *_: pytest.fail("an HVP was taken")
    )
    engine = FunctionalEngine(net, F.cross_entropy, InnerLoopOptions(steps=2))
    theta = engine.parameters()
    with torch.no_grad():
        loss, logits = engine.meta_loss(theta, step_sizes(net), TaskBatch(*tasks))
        adapted = engine.adapt(theta, step_sizes(net), Examples(*tasks[:2]))
    assert not loss.requires_grad
    assert not adapted.requires_grad
    assert torch.equal(loss, expected.loss)
    assert torch.equal(logits, expected.logits)


class GraphSpy(torch.autograd.Function):
    """Squares its input; notes whether its backward is asked to build a graph."""

    graphs: ClassVar[list[bool]] = []

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        GraphSpy.graphs.append(torch.is_grad_enabled())
        return 2 * ctx.saved_tensors[0] * grad

    @staticmethod
    def vmap(info, in_dims, x: Tensor) -> tuple[Tensor, int]:
        return GraphSpy.apply(x), in_dims[0]


class Spied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return GraphSpy.apply(self.linear(x))


@pytest.mark.parametrize("chunk", [None, 1])
@pytest.mark.parametrize(("first_order", "expected"), [(True, {False}), (False, {False, True})])
def test_first_order_builds_no_graph_of_the_inner_gradient(first_order, expected, chunk, device):
    GraphSpy.graphs.clear()
    net, tasks = Spied().double().to(device), classification("mlp", device)
    run(net, tasks, step_sizes(net), steps=2, first_order=first_order, task_chunk=chunk)
    assert set(GraphSpy.graphs) == expected


def test_the_inner_loop_does_not_track_what_asks_for_a_gradient(device):
    tracked = []

    class Watched(Spied):
        def forward(self, x: Tensor) -> Tensor:
            tracked.append(x.requires_grad)
            return self.linear(x)

    net, tasks = Watched().double().to(device), classification("mlp", device)
    actual = run(net, tasks, step_sizes(net), steps=2, task_chunk=1, memory="recompute")
    assert actual.support_x.any()
    # of each task: two inner steps, the queries, and two steps back
    assert tracked == [False, False, True, True, True] * 3


def test_first_order_takes_no_hessian_vector_product(monkeypatch, device):
    monkeypatch.setattr(
        fastmeta.engines.functional.passes, "curvature", lambda *_: pytest.fail("an HVP was taken")
    )
    net, tasks = build("mlp", device), classification("mlp", device)
    run(net, tasks, step_sizes(net), steps=3, first_order=True)


def test_inputs_are_not_modified(device):
    net, tasks = build("conv4", device), classification("conv4", device)
    lr = step_sizes(net)
    tensors = [*tasks, lr, *net.parameters(), *net.buffers()]
    before = [tensor.detach().clone() for tensor in tensors]
    run(net, tasks, lr, steps=2)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_expanded_and_strided_data_are_taken(device):
    net, tasks = build("mlp", device), classification("mlp", device)
    wide = Tasks(*(t.repeat_interleave(2, dim=1)[:, ::2] for t in tasks))
    assert_equal(run(net, wide, step_sizes(net)), run(net, tasks, step_sizes(net)))
    same = Tasks(*(t[:1].expand(3, *t.shape[1:]) for t in tasks))
    dense = Tasks(*(t.contiguous() for t in same))
    assert_equal(run(net, same, step_sizes(net)), run(net, dense, step_sizes(net)))


def test_the_peak_is_of_what_is_alive_at_once(device):
    def run() -> None:
        a = torch.ones(1 << 20, device=device)
        b = a + a
        del a
        b + b

    # A cache hands out blocks that are up to 1 MiB larger.
    assert 8 << 20 <= peak(run, torch.device(device)) < 11 << 20


def convolutional() -> nn.Module:
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8, track_running_stats=False)]
    return nn.Sequential(*layers, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 64, 5))


def image_tasks(tasks: int = 4, queries: int = 75) -> Tasks:
    """One example of each of five classes in the support, as on Omniglot."""
    x, y = torch.randn(tasks, 5, 1, 16, 16), torch.arange(5).expand(tasks, 5)
    return Tasks(x, y, x.repeat(1, queries // 5, 1, 1, 1), y.repeat(1, queries // 5))


def peak_of_meta_gradient(net: nn.Module, tasks: Tasks, steps: int, **options: object) -> int:
    """Bytes at the peak, less the K P parameters a task that the second order has to keep."""
    engine = FunctionalEngine(net, F.cross_entropy, InnerLoopOptions(steps, **options))
    peak = peak_bytes(
        lambda: engine.meta_loss(engine.parameters(), 0.1, TaskBatch(*tasks))[0].backward()
    )
    kept = 4 * steps * len(tasks[0]) * ParameterLayout.of(net).numel
    return peak - (0 if engine.options.first_order else kept)


def test_memory_does_not_grow_with_steps_as_an_unrolled_graph_does():
    net, tasks = convolutional(), image_tasks()
    two, ten = (peak_of_meta_gradient(net, tasks, k, memory="recompute") for k in (2, 10))
    kept = 4 * 10 * 4 * ParameterLayout.of(net).numel
    unrolled = peak_bytes(
        lambda: vmapped_meta_loss(net, tasks, F.cross_entropy, 0.1, 10).backward()
    )
    assert ten + kept <= unrolled / 4
    assert abs(ten / two - 1) < 0.2


def test_memory_of_the_first_order_does_not_depend_on_the_steps():
    net, tasks = convolutional(), image_tasks(queries=10)
    two, ten = (peak_of_meta_gradient(net, tasks, k, first_order=True) for k in (2, 10))
    assert ten == two
    assert two < 0.65 * peak_of_meta_gradient(net, tasks, 2, memory="recompute")


def test_memory_is_that_of_a_chunk():
    net, tasks = convolutional(), image_tasks(tasks=8, queries=5)
    whole, chunked = (peak_of_meta_gradient(net, tasks, 1, task_chunk=c) for c in (None, 2))
    assert chunked < 0.5 * whole


class Adapted(nn.Module):
    """A frozen base in bfloat16, and an adapter in float32."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Linear(3, 4).bfloat16().requires_grad_(False)
        self.down, self.up = nn.Linear(3, 2, bias=False), nn.Linear(2, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x.bfloat16()).float() + self.up(self.down(x.float()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_may_have_the_dtype_of_a_frozen_base(dtype, device):
    net, tasks = Adapted().to(device), classification("mlp", device)
    tasks = Tasks(*(x.to(dtype) if x.is_floating_point() else x for x in tasks))
    lr = torch.tensor(0.1, device=device)
    expected = meta_gradient(net, tasks, F.cross_entropy, lr, 2)
    assert_equal(run(net, tasks, lr, steps=2), expected, 2e-2)  # bfloat16 has 8 bits
    with pytest.raises(TypeError, match=r"support_x: expected dtype torch.float32, got torch.f"):
        run(net, Tasks(*(x.half() if x.is_floating_point() else x for x in tasks)), lr, steps=2)
