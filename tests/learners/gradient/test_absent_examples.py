"""Examples whose label is -1 are absent, in every learner of MAML's family."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta as fm
from fastmeta.engines.base import MetaGradient
from tests.helpers.networks import (
    Tasks,
    build,
    classification,
    joined,
    relative_error,
)

EXACT = 1e-10
SIZES = (6, 4, 3), (5, 2, 5)  # examples of the three tasks, support and query

LEARNERS: dict[str, Callable[..., fm.MAML]] = {
    "MAML": functools.partial(fm.MAML, lr=0.1, steps=2),
    "FOMAML": functools.partial(fm.FOMAML, lr=0.1, steps=2),
    "MetaSGD": functools.partial(fm.MetaSGD, lr=0.1),
    "MAMLPlusPlus": functools.partial(fm.MAMLPlusPlus, lr=0.1, steps=2, first_order_iterations=0),
    "Reptile": functools.partial(fm.Reptile, lr=0.01, steps=2, inner_batch=None),
    "IMAML": functools.partial(fm.IMAML, lr=0.1, steps=2),
    "IMAML with ggn": functools.partial(fm.IMAML, lr=0.1, steps=2, curvature="ggn"),
    "MAML with Adam": lambda net, **more: fm.MAML(net, 0.1, 2, rule=fm.rules.Adam(), **more),
    "MAML in chunks": functools.partial(fm.MAML, lr=0.1, steps=2, task_chunk=2),
    "MAML one by one": functools.partial(fm.MAML, lr=0.1, steps=2, task_chunk=1),
    "MAML in forward mode": functools.partial(fm.MAML, lr=0.1, steps=2, hvp_mode="forward"),
}
WITH_ADAM = ("Reptile", "MAML with Adam")

each_engine = pytest.mark.parametrize("engine", ["functional", "program", "auto"])
each_net = pytest.mark.parametrize("name", ["mlp", "conv4"])
# A program's batch norm, which conv4 has, does not leave examples out.
each_net_and_engine = pytest.mark.parametrize(
    ("name", "engine"),
    [
        *[("mlp", engine) for engine in ("functional", "program", "auto")],
        *[("conv4", engine) for engine in ("functional", "auto")],
    ],
)


def padded(tasks: Tasks) -> Tasks:
    """The tasks with the examples beyond SIZES absent, whose inputs are anything."""
    x, y, query_x, query_y = (tensor.clone() for tensor in tasks)
    for t, (s, q) in enumerate(zip(*SIZES, strict=True)):
        x[t, s:], query_x[t, q:] = 7.0, -3.0
        y[t, s:] = query_y[t, q:] = -1
    return Tasks(x, y, query_x, query_y)


def alone(tasks: Tasks, t: int) -> Tasks:
    """One of the tasks, without padding."""
    s, q = SIZES[0][t], SIZES[1][t]
    return Tasks(*(tensor[t : t + 1, :n] for tensor, n in zip(tasks, (s, s, q, q), strict=True)))


def mean_of(results: list[MetaGradient]) -> MetaGradient:
    lr_grads = [result.lr_grad for result in results if result.lr_grad is not None]
    lr_grad = torch.stack(lr_grads).mean(0) if lr_grads else None
    loss, grads = (
        torch.stack([getattr(r, name) for r in results]).mean(0) for name in ("loss", "grads")
    )
    return MetaGradient(loss, results[0].outputs, grads, lr_grad, {})


def errors(actual: MetaGradient, expected: MetaGradient) -> list[float]:
    names = ["loss", "grads", *(["lr_grad"] if expected.lr_grad is not None else [])]
    return [relative_error(getattr(actual, n).double(), getattr(expected, n)) for n in names]


@each_net_and_engine
@pytest.mark.parametrize("learner", LEARNERS)
def test_a_padded_batch_equals_its_tasks_one_by_one(learner, name, engine, device):
    net, tasks = build(name, device), classification(name, device)

    def result(data: Tasks, dtype: torch.dtype) -> MetaGradient:
        data = Tasks(*(t.to(dtype) if t.is_floating_point() else t for t in data))
        # A learner of its own: the inner Adam of Reptile has a state that continues.
        maml = LEARNERS[learner](copy.deepcopy(net).to(dtype), engine=engine)
        return maml.meta_gradient(*data)

    def one_by_one(dtype: torch.dtype) -> MetaGradient:
        return mean_of([result(alone(tasks, t), dtype) for t in range(3)])

    expected = one_by_one(torch.float64)
    assert max(errors(result(padded(tasks), torch.float64), expected)) < EXACT
    if learner in WITH_ADAM and name == "conv4":
        return  # it scales the rounding of zero gradients up: of biases before a batch norm
    # In float32 no more than rounding, which grows in deep networks and small differences.
    found = errors(result(padded(tasks), torch.float32), expected)
    rounding = errors(one_by_one(torch.float32), expected)
    assert all(e < max(1e-6, 4 * r) for e, r in zip(found, rounding, strict=True))


@each_net_and_engine
def test_gradients_at_absent_places_are_zero(name, engine, device):
    net, tasks = build(name, device), padded(classification(name, device))
    x, query_x = (tensor.clone().requires_grad_() for tensor in (tasks.support_x, tasks.query_x))
    maml = fm.MAML(net, 0.1, 2, engine=engine)
    maml.meta_loss(x, tasks.support_y, query_x, tasks.query_y)[0].backward()
    for tensor, y in ((x, tasks.support_y), (query_x, tasks.query_y)):
        assert not tensor.grad[y == -1].any()
        assert tensor.grad[y >= 0].any()
    adapted = maml.adapt_tasks(x, tasks.support_y).params
    (grad,) = torch.autograd.grad(adapted.square().sum(), x)
    assert not grad[tasks.support_y == -1].any() and grad.any()


@each_net_and_engine
def test_a_task_without_examples_has_no_loss(name, engine, device):
    net, tasks = build(name, device), classification(name, device)
    maml = fm.MAML(net, 0.1, 2, engine=engine)
    whole = maml.task_gradients(*tasks)
    tasks.support_y[1], tasks.query_y[0] = -1, -1
    assert torch.equal(maml.adapt_tasks(*tasks[:2]).params[1], joined(net.parameters()))
    losses, _ = maml.meta_loss(*tasks, reduction="none")
    assert losses[0] == 0 and (losses[1:] > 0).all()
    assert relative_error(maml.meta_loss(*tasks)[0], losses.sum() / 3) < EXACT
    each = maml.task_gradients(*tasks)
    assert not each[0].any() and each.isfinite().all()
    assert relative_error(each[2], whole[2]) < EXACT
    # The task without support is joint training.
    assert relative_error(each[1], maml_of_no_steps(net).task_gradients(*tasks)[1]) < EXACT


def maml_of_no_steps(net: nn.Module) -> fm.MAML:
    return fm.MAML(net, 0.1, 0, engine="functional")


@each_net_and_engine
def test_other_methods(name, engine, device):
    net, tasks = build(name, device), classification(name, device)
    maml, batch = fm.MAML(net, 0.1, 2, engine=engine), padded(tasks)
    vector = torch.randn(joined(net.parameters()).shape, dtype=torch.float64).to(device)
    theta = joined(net.parameters()).detach()

    def by_task(method: Callable[[Tasks], Tensor]) -> None:
        expected = torch.cat([method(alone(tasks, t)) for t in range(3)])
        assert relative_error(method(batch), expected) < EXACT

    by_task(lambda data: maml.adapt_tasks(*data[:2]).params)
    by_task(lambda data: maml.task_gradients(*data))
    by_task(lambda data: maml.meta_loss(*data, reduction="none")[0])
    with torch.no_grad():
        by_task(lambda data: maml.hvp(theta, data[:2], vector))
        by_task(lambda data: maml.ggnvp(theta, data[:2], vector))
        by_task(lambda data: maml.adapt_tasks(*data[:2]).params)


@each_net
def test_task_gradient_and_its_derivatives(name, device):
    net, tasks = build(name, device), classification(name, device)
    theta = joined(net.parameters()).detach().expand(3, -1).clone().requires_grad_()
    x, y, *_ = padded(tasks)
    x.requires_grad_()

    def derivatives(theta: Tensor, x: Tensor, y: Tensor) -> list[Tensor]:
        grads, losses, _ = fm.task_gradient(net, F.cross_entropy, theta, x, y)
        return [grads, losses, *torch.autograd.grad(grads.square().sum(), (theta, x))]

    *found, to_x = derivatives(theta, x, y)
    assert not to_x[y == -1].any()
    singles = []
    for t in range(3):
        single = alone(tasks, t)
        singles.append(
            derivatives(
                theta[t : t + 1], single.support_x.requires_grad_(), y[t : t + 1, : SIZES[0][t]]
            )[:3]
        )
    for actual, parts in zip(found, zip(*singles, strict=True), strict=True):
        assert relative_error(actual, torch.cat(parts)) < EXACT


@each_net
def test_task_gradient_with_weights(name, device):
    net, (x, y, *_) = build(name, device), classification(name, device)
    theta = joined(net.parameters()).detach()
    torch.manual_seed(0)
    weight = torch.rand(y.shape, dtype=torch.float64).to(device)
    gone = padded(classification(name, device)).support_y == -1
    expected = fm.task_gradient(net, F.cross_entropy, theta, x, y, weight.masked_fill(gone, 0))
    found = fm.task_gradient(net, F.cross_entropy, theta, x, y.masked_fill(gone, -1), weight)
    for actual, value in zip(found[:2], expected[:2], strict=True):
        assert relative_error(actual, value) < EXACT
    # An ignored example counts in the statistics, and has no loss.
    if name == "mlp":
        found = fm.task_gradient(net, F.cross_entropy, theta, x, y.masked_fill(gone, -100), weight)
        assert relative_error(found.grads, expected.grads) < EXACT


@each_engine
def test_streams(engine, device):
    net, tasks = build("mlp", device), classification("mlp", device)
    maml, batch = fm.MAML(net, 0.1, engine=engine), padded(tasks)

    def loss(data: Tasks) -> Tensor:
        x, y, read_x, read_y = (tensor.unsqueeze(1).repeat_interleave(2, 1) for tensor in data)
        return maml.stream_loss(x, y, read_x=read_x, read_y=read_y, momentum=0.5)[0]

    expected = torch.stack([loss(alone(tasks, t)) for t in range(3)]).mean()
    assert relative_error(loss(batch), expected) < EXACT
    parameters = list(net.parameters())
    wanted = joined(torch.autograd.grad(expected, parameters))
    assert relative_error(joined(torch.autograd.grad(loss(batch), parameters)), wanted) < EXACT


@each_net_and_engine
def test_losses_of_outputs_with_a_graph(name, engine, device):
    net, tasks = build(name, device), classification(name, device)
    maml, batch = fm.MAML(net, 0.1, 2, engine=engine), padded(tasks)
    expected = maml.meta_gradient(*batch)
    for options in ({"reduction": "none"}, {"differentiable_outputs": True}):
        net.zero_grad()
        loss, outputs = maml.meta_loss(*batch, **options)
        loss.mean().backward()
        present = batch.query_y >= 0
        assert relative_error(outputs[present], expected.outputs[present]) < EXACT
        assert relative_error(joined(p.grad for p in net.parameters()), expected.grads) < EXACT
    present = (batch.query_y >= 0).double()
    weighted, _ = maml.meta_loss(*tasks, query_weight=present, reduction="none")
    named, _ = maml.meta_loss(
        *tasks[:3], tasks.query_y.masked_fill(present == 0, -1), reduction="none"
    )
    assert relative_error(named, weighted) < EXACT


LOSSES: dict[str, Callable[..., Tensor]] = {
    "smoothed": functools.partial(F.cross_entropy, label_smoothing=0.1),
    "partial": functools.partial(F.cross_entropy, ignore_index=2),
    "ignoring": nn.CrossEntropyLoss(ignore_index=1),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "weighted": nn.CrossEntropyLoss(torch.tensor([0.5, 1.0, 2.0, 0.1], dtype=torch.float64)),
    "nll": F.nll_loss,
}


@each_net_and_engine
@pytest.mark.parametrize("loss", LOSSES)
def test_other_losses_of_classes(loss, name, engine, device):
    if loss in ("weighted", "nll"):  # they have no program
        engine = "functional"
    net, tasks = build(name, device), classification(name, device)
    for y in (tasks.support_y, tasks.query_y):
        y[:, 0] = 3  # one that no loss ignores
    fn = LOSSES[loss].to(device) if isinstance(LOSSES[loss], nn.Module) else LOSSES[loss]
    maml = fm.MAML(net, 0.01, 2, loss=fn, engine=engine)
    singles = [maml.meta_gradient(*alone(tasks, t)) for t in range(3)]
    found = maml.meta_gradient(*padded(tasks))
    expected = torch.stack([single.grads for single in singles]).mean(0)
    assert relative_error(found.grads, expected) < EXACT


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(ignore_index=-1), nn.CrossEntropyLoss()])
@each_net
def test_ignored_examples_count_in_statistics(name, loss, device):
    """As in PyTorch; so do examples of label -1, if it is the one to ignore."""
    net, tasks = build(name, device), classification(name, device)
    tasks.support_y[:, 2] = tasks.query_y[:, 1] = loss.ignore_index

    def unrolled(t: int) -> Tensor:
        params = dict(net.named_parameters())
        x, y, query_x, query_y = (tensor[t] for tensor in tasks)
        value = loss(torch.func.functional_call(net, params, (x,)), y)
        grads = torch.autograd.grad(value, list(params.values()), create_graph=True)
        params = {n: p - 0.1 * g for (n, p), g in zip(params.items(), grads, strict=True)}
        return loss(torch.func.functional_call(net, params, (query_x,)), query_y)

    expected = torch.stack([unrolled(t) for t in range(3)]).mean()
    wanted = joined(torch.autograd.grad(expected, list(net.parameters())))
    for engine in ("functional", "program"):
        found = fm.MAML(net, 0.1, loss=loss, engine=engine).meta_gradient(*tasks)
        assert relative_error(found.loss, expected) < EXACT
        assert relative_error(found.grads, wanted) < EXACT


@each_net
def test_repeated_calls_and_calls_with_absent_examples_between_them(name, device):
    """The fast path of repeated calls hands them over where the program does not take them."""
    net, tasks = build(name, device), classification(name, device)
    maml, functional = fm.MAML(net, 0.1, 2), fm.MAML(net, 0.1, 2, engine="functional")
    batches = [tasks, tasks, tasks, padded(tasks), tasks, padded(tasks)]
    for batch in batches:
        expected = functional.meta_gradient(*batch)
        assert relative_error(maml.meta_gradient(*batch).grads, expected.grads) < EXACT
        net.zero_grad()
        loss, _ = maml.meta_loss(*batch)
        loss.backward()
        assert relative_error(loss, expected.loss) < EXACT
        assert relative_error(joined(p.grad for p in net.parameters()), expected.grads) < EXACT
    wrong = tasks.support_y.clone()
    wrong[0, 0] = -2
    for method in (maml.meta_gradient, maml.meta_loss):
        with pytest.raises(ValueError, match=r"support_y: expected labels in 0..3, .* got -2"):
            method(tasks.support_x, wrong, *tasks[2:])


def test_a_program_with_a_batch_norm_says_why_there_is_none(device):
    net, tasks = build("conv4", device), padded(classification("conv4", device))
    maml = fm.MAML(net, 0.1, engine="program")
    for method in (maml.meta_gradient, maml.meta_loss):
        with pytest.raises(ValueError, match="support_y has labels -1, of absent examples, which"):
            method(*tasks)
    with pytest.raises(ValueError, match="query_y has labels -1, of absent examples, which its"):
        maml.meta_loss(tasks.support_x, tasks.support_y.clamp(min=0), *tasks[2:])
    assert "support_y has labels -1" in fm.MAML(net).explain(*tasks[:2])


@each_engine
def test_norms_on_running_statistics(engine, device):
    net, tasks = build("conv4", device), classification("conv4", device)
    net(tasks.support_x[0])
    net.eval()
    maml = fm.MAML(net, 0.1, 2, engine=engine, norm_statistics="running")
    singles = [maml.meta_gradient(*alone(tasks, t)).grads for t in range(3)]
    found = maml.meta_gradient(*padded(tasks)).grads
    assert relative_error(found, torch.stack(singles).mean(0)) < EXACT


class Segments(nn.Module):
    """A map of four classes for each of four places, with batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv1d(1, 3, 3, padding=1), nn.BatchNorm1d(3)
        self.second = nn.Conv1d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.norm(self.first(x))))


def test_labels_of_places(device):
    torch.manual_seed(0)
    net = Segments().double().to(device)
    x = torch.randn(3, 6, 1, 4, dtype=torch.float64, device=device)
    y = torch.randint(0, 4, (3, 6, 4), device=device)
    tasks = Tasks(x, y, x[:, :5], y[:, :5])
    maml = fm.MAML(net, 0.1, 2)
    expected = torch.stack([maml.meta_gradient(*alone(tasks, t)).grads for t in range(3)]).mean(0)
    batch = padded(tasks)
    assert relative_error(maml.meta_gradient(*batch).grads, expected) < EXACT
    batch.support_y[0, 0, 2] = -1  # of an example that is not absent
    with pytest.raises(ValueError, match=r"support_y: expected labels in 0..3, .* from -1 to 3"):
        maml.meta_gradient(*batch)


def test_a_norm_of_more_rows_than_examples_is_refused(device):
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.second = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            rows = self.norm(self.first(torch.cat([x, -x])))
            return self.second(rows[: len(x)])

    tasks = padded(classification("mlp", device))
    with pytest.raises(ValueError, match="expected a batch norm of the 6 examples, some of which"):
        fm.MAML(Rows().double().to(device), 0.1).meta_loss(*tasks)


def test_under_torch_compile(device):
    net, tasks = build("mlp", device), padded(classification("mlp", device))
    maml = fm.MAML(net, 0.1, 2)
    expected = maml.meta_gradient(*tasks)
    compiled = torch.compile(lambda *data: maml.meta_loss(*data)[0])
    loss = compiled(*tasks)
    loss.backward()
    assert relative_error(loss, expected.loss) < EXACT
    assert relative_error(joined(p.grad for p in net.parameters()), expected.grads) < EXACT


@each_net_and_engine
def test_adapted_tasks_leave_absent_queries_out(name, engine, device):
    tasks = padded(classification(name, device))
    maml = fm.MAML(build(name, device), 0.1, 1, engine=engine)
    adapted = maml.adapt_tasks(*tasks[:2])
    outputs = adapted(tasks.query_x, present=tasks.query_y != -1)
    for t in range(len(adapted)):
        part = alone(classification(name, device), t)
        expected = maml.adapt_tasks(*part[:2])(part.query_x)
        assert relative_error(outputs[t, : SIZES[1][t]], expected[0]) < EXACT
    with pytest.raises(ValueError, match="present: expected shape"):
        adapted(tasks.query_x, present=torch.ones(3, 2, dtype=torch.bool, device=device))
