"""Programs of images on either backend: against the functional engine and an unrolled loop.

The oracle of the compiled ops is itself held against both; the ops against it besides.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta as fm
from fastmeta.engines.base import Examples, TaskBatch
from fastmeta.engines.functional.engine import FunctionalEngine
from fastmeta.engines.program.engine import ProgramEngine
from fastmeta.ops.task_program import NAMES
from tests.helpers.engines import engines as both_engines
from tests.helpers.engines import leaves
from tests.helpers.networks import Tasks, relative_error
from tests.helpers.program_checks import Setting, skip_without_program
from tests.helpers.programs import IMAGES, build, tasks_for
from tests.helpers.unrolled import meta_gradient, set_row, with_rows_by_hand

EXACT = 1e-9

each_network = pytest.mark.parametrize("name", IMAGES)


@pytest.fixture(params=["torch", "native"])
def backend(request, device):
    if request.param == "native":
        skip_without_program(device)
    with fm.use_backend(request.param):
        yield request.param


def engines(*args, **options) -> tuple[FunctionalEngine, ProgramEngine]:
    """Both; norms in evaluation mode go by their running statistics."""
    return both_engines(*args, norm_statistics="running", **options)


def assert_equal(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> None:
    """Within what matters: the bias before a norm has no gradient but rounding."""
    scale = 1e-3 * max(float(e.abs().max()) for e in expected)
    for e, a in zip(expected, actual, strict=True):
        assert a.shape == e.shape
        assert (a - e).abs().max() < EXACT * max(float(e.abs().max()), scale)


def compare(pair: tuple[FunctionalEngine, ProgramEngine], tasks: Tasks, lr=0.1, weights=None):
    """Losses, outputs and every gradient of both engines."""
    lr = torch.as_tensor(lr, dtype=torch.float64)
    results = []
    for engine in pair:
        step, data, wanted = leaves(engine, tasks, lr)
        loss, outputs = engine.meta_loss(None, step, TaskBatch(*data), weights)
        grads = torch.autograd.grad(loss, wanted, materialize_grads=True)
        results.append((loss.detach(), outputs, *grads))
    assert_equal(*results)


@pytest.mark.rotating
@each_network
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_meta_gradients_of_every_network(name, steps, backend):
    compare(engines(build(name), F.cross_entropy, steps), tasks_for(name, tasks=2))


@each_network
def test_meta_gradients_are_those_of_an_unrolled_loop(name, backend):
    net, tasks, lr = build(name), tasks_for(name, tasks=2), torch.tensor(0.1, dtype=torch.float64)
    by_hand = with_rows_by_hand(net) if name == "norms_of_each_step" else net
    options = {"training": None, "at_step": set_row}
    expected = meta_gradient(by_hand, tasks, F.cross_entropy, lr, 2, **options)
    _, engine = engines(net, F.cross_entropy, 2)
    step, data, wanted = leaves(engine, tasks, lr)
    loss, outputs = engine.meta_loss(None, step, TaskBatch(*data))
    grads = torch.autograd.grad(loss, wanted)
    inputs = expected.support_x, expected.query_x, expected.lr
    assert_equal(
        (expected.loss, expected.logits, *expected.params.values(), *inputs),
        (loss.detach(), outputs, *grads),
    )


@pytest.mark.rotating
@each_network
def test_adapted_parameters_and_their_gradient(name, backend):
    tasks, lr = tasks_for(name, tasks=2), torch.tensor(0.1, dtype=torch.float64)
    results = []
    for engine in engines(build(name), F.cross_entropy, 2):
        step, data, wanted = leaves(engine, tasks, lr)
        adapted = engine.adapt(None, step, Examples(*data[:2]))
        value = (adapted.detach().cos() * adapted).sum()
        grads = torch.autograd.grad(value, wanted, materialize_grads=True)
        results.append((adapted.detach(), *grads))
    assert_equal(*results)


@pytest.mark.rotating
@each_network
def test_hessian_vector_products(name, backend):
    functional, program = engines(build(name), F.cross_entropy)
    x, y, *_ = tasks_for(name)
    theta = functional.parameters().detach()
    examples, vectors = Examples(x, y, role=""), torch.stack([theta.cos(), theta.sin()])
    vectors = vectors[:, None].expand(2, len(x), -1)
    for product in ("hvp", "ggnvp"):
        for vector in (theta.cos(), vectors):
            expected = getattr(functional, product)(theta, examples, vector)
            assert (
                relative_error(getattr(program, product)(theta, examples, vector), expected) < EXACT
            )


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("memory", ["keep", "recompute"])
@pytest.mark.parametrize("chunk", [None, 2])
def test_options(first_order, memory, chunk, backend):
    options = {"memory": memory, "task_chunk": chunk}
    pair = engines(build("conv4"), F.cross_entropy, 2, first_order, **options)
    weights = [0.5, 1.0]
    compare(pair, tasks_for("conv4"), 0.1, weights)
    compare(pair, tasks_for("conv4"), torch.full((2, 3, 1), 0.1))


@pytest.mark.parametrize("support", [1, 2, 7])
@pytest.mark.parametrize("tasks", [1, 5, 20])
def test_any_number_of_examples_and_tasks(support, tasks, backend):
    sizes = {"tasks": tasks, "support": support, "queries": 1}
    compare(engines(build("fused"), F.cross_entropy, 1), tasks_for("fused", **sizes))


@pytest.mark.rotating
@each_network
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("per_task", [False, True])
def test_every_compiled_op(name, dtype, per_task, device):
    skip_without_program(device)
    setting = Setting(name, "cross_entropy", device, dtype, per_task=per_task, tasks=2)
    for op in NAMES:
        setting.check(op)
    setting.check("products", gauss_newton=True)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_batch_statistics_always_and_running_ones_stay(mode, backend):
    net = getattr(build("conv4"), mode)()
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    compare(both_engines(net, F.cross_entropy), tasks_for("conv4"))
    for name, buffer in net.named_buffers():
        assert torch.equal(buffer, before[name])


def test_one_example_has_no_statistics(backend):
    """PyTorch raises for a single value a channel; then so does every engine."""
    net, tasks = build("batch_norm_of_features"), tasks_for("batch_norm_of_features", support=1)
    for engine in ("auto", "functional"):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            fm.MAML(net, engine=engine).meta_loss(*tasks)
    with pytest.raises(ValueError, match="there is no task program: support_x has one example"):
        fm.MAML(net, engine="program").meta_loss(*tasks)
    swapped = tasks.query_x, tasks.query_y, tasks.support_x, tasks.support_y
    with pytest.raises(ValueError, match="there is no task program: query_x has one example"):
        fm.MAML(net, engine="program").meta_loss(*swapped)
    with torch.no_grad():
        adapted = fm.MAML(net, engine="program").adapt_tasks(tasks.query_x, tasks.query_y)
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            adapted(tasks.support_x)


@pytest.mark.parametrize("name", ["conv4", "resnet12", "sequences"])
def test_outputs_of_adapted_tasks(name, backend):
    net, tasks = build(name), tasks_for(name)
    outputs = []
    with torch.no_grad():
        for engine in ("functional", "program"):
            adapted = fm.MAML(net, 0.1, engine=engine).adapt_tasks(*tasks[:2])
            outputs.append(adapted(tasks.query_x))
    assert relative_error(*outputs) < EXACT


def test_feature_maps_are_outputs_as_the_module_gives_them(backend):
    """[C, H, W] of each example, compared with targets of that shape."""
    net = nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3)).double()
    torch.manual_seed(5)
    data = [torch.randn(2, 4, *shape, dtype=torch.float64) for shape in ((2, 3, 4), (3, 2, 3))]
    pair = engines(net, F.mse_loss, 2)
    assert pair[1].meta_loss(None, 0.1, TaskBatch(*data, *data))[1].shape == (2, 4, 3, 2, 3)
    compare(pair, Tasks(*data, *data))


def test_a_gradient_taken_again_sees_what_changed(backend):
    maml, tasks = fm.MAML(build("conv4"), 0.1, 2, engine="program"), tasks_for("conv4")
    functional = fm.MAML(maml.module, 0.1, 2, engine="functional")
    for _ in range(4):
        actual, expected = (learner.meta_gradient(*tasks) for learner in (maml, functional))
        assert_equal(expected[:3], actual[:3])
        maml.module(tasks.support_x[0])  # moves running statistics
        with torch.no_grad():
            for parameter in maml.module.parameters():
                parameter *= 1.1


def test_explain_names_the_layers_without_a_batch(backend):
    text = fm.MAML(fm.models.Conv4(4), engine="program").explain()
    start = "Task program, one call for all steps: convolution 1 to 4, 3x3, batch norm 4, relu, max"
    assert text.startswith(start)


@pytest.mark.parametrize("half", ["first", "second"])
@each_network
def test_parameters_that_are_learned_and_not_adapted(name, half, device):
    skip_without_program(device)
    setting = Setting(name, "cross_entropy", device, half=half)
    for op in NAMES:
        setting.check(op)
    setting.check("meta_gradient", inputs=False)  # only then are bands fused
