"""The program engine against the functional engine, and where it leaves the work to it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck

import fastmeta as fm
from fastmeta.engines.base import Examples, InnerLoopOptions, TaskBatch
from fastmeta.engines.functional.engine import FunctionalEngine
from fastmeta.engines.program.engine import ProgramEngine
from tests.helpers.engines import ERRORS, auto_engine, engines, leaves
from tests.helpers.networks import Tasks, relative_error
from tests.helpers.networks import build as build_network
from tests.helpers.programs import LOSSES, NETWORKS, build, tasks_for

EXACT = 1e-10


@pytest.fixture(autouse=True)
def kernels(device):
    if (fm.core.backend.PROGRAM, device) not in fm.core.backend.KERNELS:
        pytest.skip(f"the extension has no task program for {device}")


def compare(functional: FunctionalEngine, program: ProgramEngine, tasks: Tasks, lr, weights=None):
    """Losses, outputs and every gradient of both engines."""
    results = []
    for engine in (functional, program):
        step, data, wanted = leaves(engine, tasks, lr)
        loss, outputs = engine.meta_loss(None, step, TaskBatch(*data), weights)
        grads = torch.autograd.grad(3 * loss, wanted, allow_unused=True)
        results.append((loss.detach(), outputs, *grads))
    assert_equal(*results)


def assert_equal(expected: tuple, actual: tuple) -> None:
    for e, a in zip(expected, actual, strict=True):
        assert (e is None) == (a is None)
        if e is not None and e.any():
            assert relative_error(a, e) < EXACT
        elif e is not None:
            assert a.abs().max() < 1e-14


@pytest.mark.parametrize("name", NETWORKS)
def test_meta_gradients_of_every_network(name, device):
    lr = torch.tensor(0.1, dtype=torch.float64, device=device)
    pair = engines(build(name, device), F.mse_loss, 2)
    tasks = tasks_for(name, "mse", device)
    compare(*pair, tasks, lr)


@pytest.mark.parametrize("loss", LOSSES)
def test_meta_gradients_of_every_loss(loss, device):
    pair = engines(build("gelu", device), LOSSES[loss], 2)
    compare(*pair, tasks_for("gelu", loss, device), 0.1)


@pytest.mark.parametrize("steps", range(6))
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("memory", ["keep", "recompute", "auto"])
def test_meta_gradients_of_any_number_of_steps(steps, first_order, memory, device):
    pair = engines(build("deep", device), F.cross_entropy, steps, first_order, memory=memory)
    lr = torch.tensor(0.3, dtype=torch.float64, device=device)
    compare(*pair, tasks_for("deep", device=device), lr)


P, L, T, K = 31, 4, 3, 2  # of the network "tanh" [3, 4, 3], its tasks, and the steps here
STEP_SIZES = [(), (1,), (L,), (P,), (T, 1), (T, L), (T, P), (K, 1, 1), (K, 1, L)]
STEP_SIZES += [(K, 1, P), (K, T, 1), (K, T, P), (1, T, L)]


@pytest.mark.parametrize("shape", STEP_SIZES, ids=str)
@pytest.mark.parametrize("first_order", [False, True])
def test_meta_gradients_of_every_form_of_step_size(shape, first_order, device):
    net = build("tanh", device)
    torch.manual_seed(4)
    lr = (0.1 + 0.05 * torch.rand(shape, dtype=torch.float64)).to(device)
    compare(*engines(net, F.mse_loss, K, first_order), tasks_for("tanh", "mse", device), lr)


@pytest.mark.parametrize("weights", [[0.2, 0.5, 1.0], [0.0, 1.0, 0.0], torch.tensor([1.0, 0, 0])])
@pytest.mark.parametrize("first_order", [False, True])
def test_meta_gradients_with_a_query_loss_at_every_step(weights, first_order, device):
    pair = engines(build("silu", device), F.cross_entropy, 3, first_order)
    lr = torch.tensor(0.2, dtype=torch.float64, device=device)
    compare(*pair, tasks_for("silu", device=device), lr, weights)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
@pytest.mark.parametrize("shape", [(), (T, P), (K, T, 1)], ids=str)
def test_chunks_change_nothing(chunk, shape, device):
    functional, program = engines(build("tanh", device), F.mse_loss, K, task_chunk=chunk)
    tasks = tasks_for("tanh", "mse", device)
    lr = torch.full(shape, 0.2, dtype=torch.float64, device=device)
    compare(functional, program, tasks, lr)
    compare_adapted(functional, program, tasks, lr)
    theta = program.parameters().detach()
    x, y, *_ = tasks
    examples, many = Examples(x, y, role=""), torch.stack([theta, theta.cos()])
    for vector in (theta, many[:, None].expand(2, len(x), -1)):
        expected = functional.hvp(theta, examples, vector)
        assert relative_error(program.hvp(theta, examples, vector), expected) < EXACT


def compare_adapted(functional, program, tasks: Tasks, lr) -> None:
    results = []
    for engine in (functional, program):
        step, data, wanted = leaves(engine, tasks, lr)
        adapted = engine.adapt(None, step, Examples(*data[:2]))
        weight = torch.linspace(-1, 1, adapted.numel(), dtype=torch.float64).to(adapted)
        value = (weight.view_as(adapted) * adapted.sin()).sum()
        results.append((adapted.detach(), *torch.autograd.grad(value, wanted, allow_unused=True)))
    assert_equal(*results)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("first_order", [False, True])
def test_adapted_parameters_and_their_gradient(name, first_order, device):
    pair = engines(build(name, device), F.mse_loss, 2, first_order)
    lr = torch.tensor(0.1, dtype=torch.float64, device=device)
    compare_adapted(*pair, tasks_for(name, "mse", device), lr)


@pytest.mark.parametrize("rows", [(), (3,)])
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("chunk", [None, 2])
def test_from_other_parameters(rows, steps, chunk, device):
    net = build("residual", device)
    functional, program = engines(net, F.mse_loss, steps, task_chunk=chunk)
    tasks = tasks_for("residual", "mse", device)
    start = functional.parameters().detach()
    results = []
    for engine in (functional, program):
        theta = (1.1 * start).expand(*rows, -1).clone().requires_grad_()
        loss, outputs = engine.meta_loss(theta, 0.1, TaskBatch(*tasks))
        adapted = engine.adapt(theta, 0.1, Examples(*tasks[:2]))
        grads = (torch.autograd.grad(v, theta)[0] for v in (loss, adapted.square().sum()))
        results.append((loss.detach(), outputs, adapted.detach(), *grads))
    assert_equal(*results)


@pytest.mark.parametrize("name", ["tanh", "layer_norm", "last_dimension", "frozen"])
def test_hessian_vector_products(name, device):
    functional, program = engines(build(name, device), F.mse_loss)
    x, y, *_ = tasks_for(name, "mse", device)
    theta = functional.parameters().detach()
    vector = theta.cos()
    rows = torch.stack([vector, 2 * vector, -vector])
    many, examples = torch.stack([rows, rows.flip(0)]), Examples(x, y, role="")
    for product in ("hvp", "ggnvp"):
        for params, v in (
            (theta, vector),
            (theta, rows),
            (rows, vector),
            (rows, rows),
            (rows, many),
        ):
            expected = getattr(functional, product)(params, examples, v)
            assert relative_error(getattr(program, product)(params, examples, v), expected) < EXACT


@pytest.mark.parametrize("name", ["softplus", "layer_norm", "frozen"])
def test_derivatives_match_finite_differences(name, device):
    net = build(name, device)
    engine = ProgramEngine(net, F.mse_loss, InnerLoopOptions(2))
    tasks = tasks_for(name, "mse", device, tasks=2, support=2, queries=2)
    theta = engine.parameters().detach().requires_grad_()
    lr = torch.full((2, 1, 1), 0.1, dtype=torch.float64, device=device, requires_grad=True)
    support_x, query_x = (x.clone().requires_grad_() for x in (tasks.support_x, tasks.query_x))

    def meta_loss(theta, lr, support_x, query_x):
        data = support_x, tasks.support_y, query_x, tasks.query_y
        return engine.meta_loss(theta, lr, TaskBatch(*data))[0]

    def adapted(theta, lr, support_x):
        return engine.adapt(theta, lr, Examples(support_x, tasks.support_y))

    assert gradcheck(meta_loss, (theta, lr, support_x, query_x))
    assert gradcheck(adapted, (theta, lr, support_x), fast_mode=True)


def test_gradients_can_be_taken_again_but_not_differentiated(device):
    net, tasks = build("tanh", device), tasks_for("tanh", device=device)
    engine = ProgramEngine(net, F.cross_entropy)
    loss, _ = engine.meta_loss(None, 0.1, TaskBatch(*tasks))
    loss.backward(retain_graph=True)
    first = [p.grad.clone() for p in net.parameters()]
    (2 * loss).backward()
    for p, g in zip(net.parameters(), first, strict=True):
        assert torch.equal(p.grad, g + 2 * g)
    for value in (
        engine.meta_loss(None, 0.1, TaskBatch(*tasks))[0],
        engine.adapt(None, 0.1, Examples(*tasks[:2])),
    ):
        grads = torch.autograd.grad(value.sum(), list(net.parameters()), create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            sum(g.sum() for g in grads).backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode, device):
    net, tasks = build("frozen", device), tasks_for("frozen", device=device)
    engine = ProgramEngine(net, F.cross_entropy, InnerLoopOptions(3))
    expected = [t.detach() for t in (*engine.meta_loss(None, 0.1, TaskBatch(*tasks)),)]
    adapted = engine.adapt(None, 0.1, Examples(*tasks[:2])).detach()
    with mode():
        loss, outputs = engine.meta_loss(None, 0.1, TaskBatch(*tasks))
        assert not loss.requires_grad
        again = engine.adapt(None, 0.1, Examples(*tasks[:2]))
    for a, b in ((loss, expected[0]), (outputs, expected[1]), (again, adapted)):
        torch.testing.assert_close(a.clone(), b, rtol=1e-12, atol=1e-14)


def test_parameters_changed_since_do_not_change_a_gradient(device):
    net, tasks = build("frozen", device), tasks_for("frozen", device=device)
    engine = ProgramEngine(net, F.cross_entropy)
    expected = torch.autograd.grad(
        engine.adapt(None, 0.1, Examples(*tasks[:2])).sum(), net[3].weight
    )
    adapted = engine.adapt(None, 0.1, Examples(*tasks[:2]))
    with torch.no_grad():
        for p in net.parameters():
            p += 1
    assert torch.equal(torch.autograd.grad(adapted.sum(), net[3].weight)[0], expected[0])
    assert not torch.equal(engine.adapt(None, 0.1, Examples(*tasks[:2])), adapted)
    adapted = engine.adapt(None, 0.1, Examples(*tasks[:2]))
    tasks.support_x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        adapted.sum().backward()


class Marked(Tensor):
    """A subclass of Tensor."""


def replaced(tasks: Tasks, name: str, change) -> Tasks:
    return tasks._replace(**{name: change(getattr(tasks, name))})


BATCHES = {
    "support_x is torch.int64": ("mse", lambda t: [x.long() if x.ndim == 3 else x for x in t]),
    "query_y is torch.float64": (
        "cross_entropy",
        lambda t: replaced(t, "query_y", lambda y: F.one_hot(y, 3).double()),
    ),
    "support_y is torch.float64 [3, 4, 3, 1]; the program takes torch.float64 targets [T, "
    "examples, 3]": ("mse", lambda t: replaced(t, "support_y", lambda y: y[..., None])),
    "targets require gradients": (
        "mse",
        lambda t: replaced(t, "query_y", lambda y: y.clone().requires_grad_()),
    ),
    "query_x is a Marked that is no plain tensor": (
        "mse",
        lambda t: replaced(t, "query_x", lambda x: x.as_subclass(Marked)),
    ),
    "examples there have shape [4]": ("mse", lambda t: [F.pad(x, (0, 1)) for x in t]),
}


@pytest.mark.parametrize("words", BATCHES)
def test_batches_that_a_program_does_not_take(words, device):
    loss, change = BATCHES[words]
    tasks = change(tasks_for("tanh", loss, device))
    with pytest.raises(ValueError, match="there is no task program: ") as error:
        ProgramEngine(build("tanh", device), LOSSES[loss]).meta_loss(None, 0.1, TaskBatch(*tasks))
    assert words in str(error.value)


def test_what_a_program_does_not_take_the_functional_engine_does(device):
    net, tasks = build("tanh", device), tasks_for("tanh", "cross_entropy", device)
    probabilities = replaced(tasks, "query_y", lambda y: F.one_hot(y, 3).double())
    engines = FunctionalEngine(net, F.cross_entropy), auto_engine(net, F.cross_entropy)
    expected, actual = (e.meta_loss(None, 0.1, TaskBatch(*probabilities))[0] for e in engines)
    assert torch.equal(actual, expected)


def test_circumstances_that_a_program_does_not_take(device):
    net, tasks = build("tanh", device, torch.float32), tasks_for("tanh", device=device)
    tasks = Tasks(*(t.float() if t.is_floating_point() else t for t in tasks))
    engine = ProgramEngine(net, F.cross_entropy)
    with (
        torch.autocast(device, torch.bfloat16),
        pytest.raises(ValueError, match="autocast is on"),
    ):
        engine.meta_loss(None, 0.1, TaskBatch(*tasks))
    rough = ProgramEngine(net, F.cross_entropy, InnerLoopOptions(hvp_mode="finite_difference"))
    with pytest.raises(ValueError, match="hvp_mode is 'finite_difference'"):
        rough.meta_loss(None, 0.1, TaskBatch(*tasks))
    theta = engine.parameters()
    with pytest.raises(ValueError, match="the product is to be differentiated"):
        engine.hvp(theta, Examples(*tasks[:2], role=""), theta)
    expected = FunctionalEngine(net, F.cross_entropy).hvp(
        theta, Examples(*tasks[:2], role=""), theta
    )
    product = auto_engine(net, F.cross_entropy).hvp(theta, Examples(*tasks[:2], role=""), theta)
    assert product.requires_grad and torch.equal(product, expected)


def test_without_compiled_ops(device):
    net, tasks = build("tanh", device), tasks_for("tanh", device=device)
    compiled, _ = auto_engine(net, F.cross_entropy, InnerLoopOptions(2)).meta_loss(
        None, 0.1, TaskBatch(*tasks)
    )
    with fm.use_backend("torch"):
        assert "Functional engine" in fm.MAML(net).explain()
        assert "the torch backend was asked for" in fm.MAML(net).explain()
        required = ProgramEngine(net, F.cross_entropy, InnerLoopOptions(2))
        plain, _ = required.meta_loss(None, 0.1, TaskBatch(*tasks))
    assert relative_error(compiled, plain) < EXACT


def test_the_backend_of_the_program(device):
    assert fm.backend_of("task_program", device, torch.float64) == "native"
    assert fm.backend_of("task_program", device, torch.float16) == "torch"


def test_an_option_that_is_not_there():
    with pytest.raises(ValueError, match=r"memory: expected one of .*, got 'all'"):
        InnerLoopOptions(memory="all")


@pytest.mark.parametrize(("change", "error", "message"), ERRORS)
def test_bad_data_is_named_as_the_functional_engine_names_it(change, error, message, device):
    ((name, value),) = change.items()
    net = build_network("mlp", device)
    tasks = Tasks(*(t.to(device) for t in tasks_for("tanh", device=device, support=6, queries=5)))
    if isinstance(value, tuple):
        value = torch.zeros(value, dtype=torch.float64, device=device)
    elif callable(value):
        value = value(getattr(tasks, name))
    for engine in ("auto", "functional"):
        maml = fm.MAML(net, 0.1, engine=engine)
        text = message.replace("DEVICE", str(tasks.query_x.device)).split(".*")[0]
        with pytest.raises(error, match=text):
            maml.meta_loss(*tasks._replace(**{name: value}))


def test_maml_runs_the_program_where_it_can(device, monkeypatch):
    calls = []
    run = FunctionalEngine.meta_loss
    monkeypatch.setattr(FunctionalEngine, "meta_loss", lambda *a: (calls.append(1), run(*a))[1])
    net, tasks = build("tanh", device), tasks_for("tanh", device=device)
    for engine in ("auto", "program"):
        fm.MAML(net, engine=engine).meta_loss(*tasks)
    assert not calls
    fm.MAML(net, engine="functional").meta_loss(*tasks)
    assert len(calls) == 1
    net[1].register_forward_hook(lambda *a: None)
    fm.MAML(net).meta_loss(*tasks)
    assert len(calls) == 2
    with pytest.raises(ValueError, match=r"there is no task program: model\.1 has hooks"):
        fm.MAML(net, engine="program").meta_loss(*tasks)


def test_maml_sees_what_changes_between_calls(device):
    net, tasks = build("tanh", device), tasks_for("tanh", device=device)
    maml = fm.MAML(net, 0.1, engine="program")
    maml.meta_loss(*tasks)
    changes = (
        lambda: net[0].requires_grad_(False),
        lambda: net.__setitem__(1, nn.ReLU()),
        lambda: net[2].weight.data.mul_(2),
        lambda: setattr(maml, "loss", nn.CrossEntropyLoss(label_smoothing=0.3)),
        lambda: setattr(maml, "steps", 3),
    )
    for change in changes:
        before, _ = maml.meta_loss(*tasks)
        change()
        after, _ = maml.meta_loss(*tasks)
        options = maml.lr, maml.steps, False, maml.loss
        expected, _ = fm.MAML(net, *options, engine="functional").meta_loss(*tasks)
        assert relative_error(after, expected) < EXACT
        assert before != after or change is changes[0]


def test_copies_of_a_learner_have_programs_of_their_own(device):
    net, tasks = build("tanh", device), tasks_for("tanh", device=device)
    maml = fm.MAML(net, 0.1, engine="program")
    loss, _ = maml.meta_loss(*tasks)
    for twin in (copy.deepcopy(maml), pickle.loads(pickle.dumps(maml))):
        assert twin.meta_loss(*tasks)[0].item() == loss.item()
        with torch.no_grad():
            twin.module[0].weight += 1
        assert twin.meta_loss(*tasks)[0].item() != loss.item()
    assert maml.meta_loss(*tasks)[0].item() == loss.item()


@pytest.mark.parametrize("name", ["deep", "frozen", "last_dimension"])
def test_outputs_of_adapted_tasks(name, device):
    net, tasks = build(name, device), tasks_for(name, device=device)
    outputs = []
    for engine in ("functional", "program"):
        with torch.no_grad():
            adapted = fm.MAML(net, 0.1, 2, engine=engine).adapt_tasks(*tasks[:2])
            outputs.append(adapted(tasks.query_x))
            assert adapted(tasks.query_x[:, :0]).shape == (3, 0, *outputs[-1].shape[2:])
    assert relative_error(*outputs) < EXACT
    with pytest.raises(ValueError, match=r"query_x: expected shape \[3, Q, ...\]"):
        adapted(tasks.query_x[:2])


def test_outputs_are_differentiable_where_that_is_asked_for(device):
    net, tasks = build("tanh", device), tasks_for("tanh", device=device)
    maml = fm.MAML(net, 0.1, 2, engine="program")
    loss, _ = maml.meta_loss(*tasks)
    expected = torch.autograd.grad(loss, net[0].weight)[0]
    outputs = maml.adapt_tasks(*tasks[:2])(tasks.query_x)
    own = F.cross_entropy(outputs.flatten(0, 1), tasks.query_y.flatten())
    assert relative_error(torch.autograd.grad(own, net[0].weight)[0], expected) < EXACT


def test_explain_says_which_program_runs_and_why_none_does(device):
    net = build("deep", device)
    text = fm.MAML(net, 0.1, 3).explain()
    for part in (
        "Task program, one call for all steps: linear 6 to 7, relu, linear 7 to 5, relu, linear 5 "
        "to 3; cross entropy",
        "107 adapted parameters in 6 tensors",
        "all tasks together",
        "Inner steps: 3, second order by the adjoint, one exact Hessian-vector product a step.",
        f"Everything by the native backend on {device} in float64.",
    ):
        assert part in text
    assert "2 tasks at a time" in fm.MAML(net, task_chunk=2).explain()
    other = nn.Sequential(nn.Linear(3, 3), nn.Softmax(1))
    text = fm.MAML(other).explain()
    assert text.startswith("Functional engine, which takes any nn.Module (here Sequential")
    assert text.endswith(
        "No task program: model.1 is a Softmax, which the program does not have yet."
    )
    text = fm.MAML(other, engine="program").explain()
    assert text.startswith("engine='program', but there is no task program: model.1 is a Softmax")


def test_explain_looks_at_a_batch(device):
    maml, tasks = fm.MAML(build("deep", device)), tasks_for("deep", device=device)
    assert maml.explain(*tasks[:2]).startswith("Task program")
    wrong = maml.explain(tasks.support_x, F.one_hot(tasks.support_y, 3).double())
    assert "No task program: support_y is torch.float64 [3, 4, 3]; the program takes int64" in wrong
    with pytest.raises(TypeError, match=r"support: expected inputs and targets, .* got Tensor"):
        maml.explain(tasks.support_x)
