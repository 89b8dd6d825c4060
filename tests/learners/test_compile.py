"""Whole training steps under torch.compile: one graph for any number of tasks, eager's numbers."""

from __future__ import annotations

import copy
import functools
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastmeta as fm
from fastmeta.learners import _compile
from tests.helpers.networks import Tasks, build, classification, relative_error

EXACT = 1e-10
WAYS = 4


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def anil(body: nn.Module, **options: Any) -> fm.ANIL:
    *layers, head = body
    return fm.ANIL(nn.Sequential(*layers), head, lr=0.1, steps=3, **options)


def relation_net(body: nn.Module, **options: Any) -> fm.RelationNet:
    torch.manual_seed(1)
    return fm.RelationNet(body, fm.models.RelationMLP(WAYS, 8), **options).double()


# They compare embeddings.
METRIC = (fm.ProtoNet, fm.MatchingNet, fm.SiameseNet, fm.RelationNet)

LEARNERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ProtoNet": lambda net: fm.ProtoNet(net),
    "MatchingNet": lambda net: fm.MatchingNet(net),
    "MatchingNet learned": lambda net: fm.MatchingNet(net, learn_scale=True).double(),
    "SiameseNet": lambda net: fm.SiameseNet(net, WAYS).double(),
    "SiameseNet contrastive": lambda net: fm.SiameseNet(net, WAYS, "contrastive", reduce="mean"),
    "RelationNet": lambda net: relation_net(net),
    "RelationNet cross entropy": lambda net: relation_net(net, loss="cross_entropy"),
    "ANIL": anil,
    "ANIL first order": lambda net: anil(net, first_order=True),
    "MAML": lambda net: fm.MAML(net, 0.1, steps=2),
    "MAML functional": lambda net: fm.MAML(net, 0.1, steps=2, engine="functional"),
    "MAML learned lr": lambda net: fm.MAML(net, 0.1, steps=2, learn_lr=True),
    "FOMAML": lambda net: fm.FOMAML(net, 0.1, steps=2),
    "MetaSGD": lambda net: fm.MetaSGD(net, lr=0.05),
    "MAMLPlusPlus": lambda net: fm.MAMLPlusPlus(
        net, steps=2, multi_step_iterations=9, first_order_iterations=2
    ),
    "MetaCurvature": lambda net: fm.MetaCurvature(net, 0.1, steps=2),
    "IMAML": lambda net: fm.IMAML(net, 0.1, steps=3, cg_steps=2),
    "IMAML of a head": lambda net: fm.IMAML(net, 0.1, steps=3, cg_steps=2, adapt="4.*"),
    "Reptile": lambda net: fm.Reptile(net, inner_batch=4),
}


def step_of(learner: nn.Module) -> Callable[[Tasks], tuple[Tensor, Tensor]]:
    """A meta-loss as users compile it; some learners have to know the number of classes."""
    options = {"num_classes": WAYS} if isinstance(learner, METRIC) else {}

    def step(tasks: Tasks) -> tuple[Tensor, Tensor]:
        loss, outputs = learner.meta_loss(*tasks, **options)
        return loss.mul(3).sin(), outputs

    return step


def batch_of(learner: nn.Module, network: str, device: str, tasks: int) -> Tasks:
    """Tasks that the learner takes: some need queries of classes that the support has."""
    batch = classification(network, device, tasks)
    if not isinstance(learner, METRIC):
        return batch
    return batch._replace(query_y=batch.support_y[:, : batch.query_y.shape[1]])


def gradient(step: Callable, learner: nn.Module, tasks: Tasks) -> list[Tensor]:
    """Loss, outputs and all gradients, with the same random numbers at each call."""
    learner.zero_grad()
    torch.manual_seed(0)
    loss, outputs = step(tasks)
    loss.backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in learner.parameters()]
    return [loss.detach(), outputs, *grads]


def hold_together(compiled: list[Tensor], eager: list[Tensor], bound: float) -> None:
    # Beside the largest of all: a bias ahead of a batch norm has a gradient of rounding alone.
    largest = max(float(finite(x).abs().max()) for x in eager)
    for actual, expected in zip(compiled, eager, strict=True):
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
        assert torch.equal(actual.isinf(), expected.isinf())  # of classes that a task lacks
        assert (finite(actual) - finite(expected)).abs().max() <= bound * largest


def finite(x: Tensor) -> Tensor:
    return torch.where(x.isinf(), 0.0, x.detach())


OF_IMAGES = ("ANIL", "MAML", "MAML functional")


@pytest.mark.rotating
@pytest.mark.parametrize(
    ("name", "network"),
    [*((name, "mlp") for name in LEARNERS), *((name, "conv4") for name in OF_IMAGES)],
)
def test_a_meta_loss_is_one_graph_for_any_number_of_tasks(name, network, device):
    learner = LEARNERS[name](build(network, device))
    twin = copy.deepcopy(learner)
    step = torch.compile(step_of(learner), fullgraph=True, backend="aot_eager", dynamic=True)
    for tasks in (7, 2, 9):
        batch = batch_of(learner, network, device, tasks)
        hold_together(gradient(step, learner, batch), gradient(step_of(twin), twin, batch), EXACT)
    assert graphs() == 1


@pytest.mark.parametrize("name", ["ProtoNet", "ANIL", "MAML"])
def test_a_marked_number_of_tasks(name, device):
    learner = LEARNERS[name](build("mlp", device))
    step = torch.compile(step_of(learner), fullgraph=True, backend="aot_eager")
    for tasks in (7, 2, 9):
        batch = batch_of(learner, "mlp", device, tasks)
        for tensor in batch:
            torch._dynamo.mark_dynamic(tensor, 0)
        hold_together(
            gradient(step, learner, batch), gradient(step_of(learner), learner, batch), EXACT
        )
    assert graphs() == 1


@pytest.mark.parametrize("name", ["ProtoNet", "ANIL", "MAML"])
def test_unmarked_numbers_of_tasks_take_two_graphs(name, device):
    learner = LEARNERS[name](build("mlp", device))
    step = torch.compile(step_of(learner), fullgraph=True, backend="aot_eager")
    for tasks in (7, 2, 9, 8, 6):
        gradient(step, learner, batch_of(learner, "mlp", device, tasks))
    assert graphs() == 2


@pytest.mark.parametrize("name", ["ANIL", "MAML", "MAML functional", "MetaSGD"])
def test_a_graph_that_changes_the_parameters_first(name, device):
    """It writes them back at its end: until then the learner's own are the old ones."""
    learner = LEARNERS[name](build("mlp", device))
    twin, batch = copy.deepcopy(learner), classification("mlp", device, 7)

    def step_after_decay(tasks: Tasks, each: nn.Module) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            for p in each.parameters():
                p.mul_(0.5)
        return each.meta_loss(*tasks)

    compiled = torch.compile(step_after_decay, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        actual = gradient(functools.partial(compiled, each=learner), learner, batch)
        expected = gradient(functools.partial(step_after_decay, each=twin), twin, batch)
        hold_together(actual, expected, EXACT)
    hold_together(list(learner.parameters()), list(twin.parameters()), EXACT)


@pytest.mark.rotating
@pytest.mark.parametrize("name", ["ANIL", "MAML", "MAML functional", "ProtoNet"])
def test_gradients_reach_what_the_examples_come_from(name, device):
    """A network in front of the learner, in the same graph."""
    learner, front = LEARNERS[name](build("mlp", device)), nn.Linear(3, 3).double().to(device)
    both = nn.ModuleList([learner, front])

    def step(tasks: Tasks) -> tuple[Tensor, Tensor]:
        x, queries = front(tasks.support_x), front(tasks.query_x)
        return step_of(learner)(tasks._replace(support_x=x, query_x=queries))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    batch = batch_of(learner, "mlp", device, 7)
    actual, expected = gradient(compiled, both, batch), gradient(step, both, batch)
    assert front.weight.grad.abs().max() > 0
    hold_together(actual, expected, EXACT)


class Regularized(fm.MAML):
    """A learner of the user's, around the meta-loss of its parent."""

    def meta_loss(self, *tasks: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        loss, outputs = super().meta_loss(*tasks, **options)
        return loss + sum(p.square().sum() for p in self.parameters()), outputs


def test_a_subclass_adds_its_own_once(device):
    learner, batch = Regularized(build("mlp", device), 0.1), classification("mlp", device, 7)
    step = torch.compile(step_of(learner), fullgraph=True, backend="aot_eager")
    hold_together(gradient(step, learner, batch), gradient(step_of(learner), learner, batch), EXACT)


def test_options_and_step_weights_may_change(device):
    """Between calls of one graph: both are read when it runs."""
    learner, batch = fm.MAML(build("mlp", device), 0.1, steps=2), classification("mlp", device, 7)

    def step(tasks: Tasks, weights: Tensor) -> tuple[Tensor, Tensor]:
        return learner.meta_loss(*tasks, step_weights=weights)

    compiled, found = torch.compile(step, fullgraph=True, backend="aot_eager"), []
    for weights, first_order in (((0.5, 0.5), False), ((0.0, 1.0), False), ((0.0, 1.0), True)):
        learner.first_order = first_order
        both = [
            gradient(
                lambda tasks, call=call, w=weights: call(tasks, torch.tensor(w)), learner, batch
            )
            for call in (compiled, step)
        ]
        hold_together(*both, EXACT)
        found.append(both[0][2])
    assert graphs() == 1
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])


def test_two_learners_in_one_compiled_function(device):
    batch = classification("mlp", device, 7)

    def meta_loss(learner: nn.Module, tasks: Tasks) -> tuple[Tensor, Tensor]:
        return learner.meta_loss(*tasks)

    compiled = torch.compile(meta_loss, fullgraph=True, backend="aot_eager")
    for steps in (1, 2):
        learner = fm.MAML(build("mlp", device), 0.1, steps)
        both = [
            gradient(functools.partial(call, learner), learner, batch)
            for call in (compiled, meta_loss)
        ]
        hold_together(*both, EXACT)


def test_without_gradients(device):
    learner, batch = fm.MAML(build("mlp", device), 0.1), classification("mlp", device, 7)
    compiled = torch.compile(learner.meta_loss, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        loss, outputs = compiled(*batch)
        expected = learner.meta_loss(*batch)
    assert not loss.requires_grad
    assert torch.equal(loss, expected[0]) and torch.equal(outputs, expected[1])


def test_errors_are_those_of_the_learner(device):
    learner, batch = fm.MAML(build("mlp", device), 0.1), classification("mlp", device, 7)
    compiled = torch.compile(learner.meta_loss, fullgraph=True, backend="aot_eager")
    compiled(*batch)
    with pytest.raises(ValueError, match="support_y"):
        compiled(batch.support_x, batch.support_y + 4, batch.query_x, batch.query_y)


def labels(tasks: int, count: int) -> Tensor:
    return torch.arange(count).remainder(3).repeat(tasks, 1)


# op -> its inputs for a number of tasks, and a call
OPS: dict[str, tuple[Callable[[int], tuple[Tensor, ...]], Callable[..., Any]]] = {
    "prototypes": (
        lambda t: (torch.rand(t, 6, 5), labels(t, 6)),
        lambda x, y: fm.prototypes(x, y, 3),
    ),
    "pairwise_distance": (
        lambda t: (torch.rand(t, 8, 5), torch.rand(t, 3, 5)),
        fm.pairwise_distance,
    ),
    "nearest": (
        lambda t: (torch.rand(t, 8, 5), torch.rand(t, 3, 5)),
        lambda x, y: fm.nearest(x, y, 2),
    ),
    "prototype_loss": (
        lambda t: (torch.rand(t, 8, 5), labels(t, 8), torch.rand(t, 3, 5)),
        fm.prototype_loss,
    ),
    "pair_scores": (
        lambda t: (torch.rand(t, 8, 5), torch.rand(t, 3, 5), torch.rand(5)),
        fm.pair_scores,
    ),
    "pair_pool": (
        lambda t: (torch.rand(t, 4, 2, 5, 5), torch.rand(t, 3, 2, 5, 5)),
        fm.pair_pool,
    ),
    "matching_loss": (
        lambda t: (torch.rand(t, 8, 5), labels(t, 8), torch.rand(t, 7, 5), labels(t, 7)),
        fm.matching_loss,
    ),
    "matching_logits": (
        lambda t: (torch.rand(t, 8, 5), torch.rand(t, 7, 5), labels(t, 7)),
        lambda x, y, labels: fm.matching_logits(x, y, labels, 3),
    ),
    "inner_update": (
        lambda t: (torch.rand(t, 11), torch.rand(t, 11)),
        lambda p, g: fm.inner_update(p, g, 0.1),
    ),
    "linear_head": (
        lambda t: (torch.rand(t, 6, 5), labels(t, 6), torch.rand(3, 5)),
        lambda x, y, w: fm.linear_head(x, y, w, lr=0.1, steps=4)[0],
    ),
    "ridge_head": (
        lambda t: (torch.rand(t, 6, 5), torch.rand(t, 6, 3)),
        lambda x, y: fm.ridge_head(x, y, 0.5)[0],
    ),
    "task_conv2d": (
        lambda t: (torch.rand(t, 2, 4, 9, 9), torch.rand(t, 6, 4, 3, 3)),
        fm.task_conv2d,
    ),
    "task_batch_norm": (
        lambda t: (torch.rand(t, 7, 4, 9, 9), torch.rand(t, 4)),
        fm.task_batch_norm,
    ),
    "activation": (lambda t: (torch.randn(t, 7),), lambda x: fm.activation(x, "mish")),
}


@pytest.mark.rotating
@pytest.mark.parametrize("op", OPS)
def test_an_op_makes_no_new_graph_for_another_number_of_tasks(op, device):
    make, call = OPS[op]
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    made = []
    for tasks in (19, 17, 23):
        inputs = [x.to(device) for x in make(tasks)]
        torch.testing.assert_close(compiled(*inputs), call(*inputs))
        made.append(graphs())
    assert made[0] == made[-1]


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_hvp(mode, device):
    def product(w: Tensor, v: Tensor, x: Tensor) -> Tensor:
        return fm.hvp(lambda w, x: (x @ w).tanh().square().sum(), w, v, x, mode=mode)

    compiled = torch.compile(product, fullgraph=True, backend="aot_eager", dynamic=True)
    for tasks in (7, 2, 9):
        generator = torch.Generator().manual_seed(tasks)
        shapes = ((tasks, 3), (tasks, 3), (tasks, 6, 3))
        inputs = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
        inputs = [x.to(device) for x in inputs]
        assert relative_error(compiled(*inputs), product(*inputs)) < EXACT
    # PyTorch fixes the sizes of forward-mode tangents.
    assert graphs() == {"reverse": 1, "forward": 3}[mode]


@pytest.mark.parametrize("name", ["hvp", "ggnvp"])
def test_products_with_many_vectors(name, device):
    def forward(w: Tensor, x: Tensor) -> Tensor:
        return (x @ w).tanh()

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        return (outputs - y).square().sum()

    def product(w: Tensor, v: Tensor, x: Tensor, y: Tensor) -> Tensor:
        if name == "ggnvp":
            return fm.ggnvp(forward, loss, w, v, x, y)
        return fm.hvp(lambda w, x, y: loss(forward(w, x), y), w, v, x, y)

    compiled = torch.compile(product, fullgraph=True, backend="aot_eager", dynamic=True)
    for tasks in (7, 2, 9):
        generator = torch.Generator().manual_seed(tasks)
        shapes = ((tasks, 3), (4, tasks, 3), (tasks, 6, 3), (tasks, 6))
        inputs = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
        inputs = [x.to(device) for x in inputs]
        assert relative_error(compiled(*inputs), product(*inputs)) < EXACT
    assert graphs() == 1


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor takes a C++ compiler")
@pytest.mark.parametrize("name", ["ANIL", "MAML"])
def test_by_inductor(name, device):
    learner = LEARNERS[name](build("mlp", device))
    step = torch.compile(step_of(learner), fullgraph=True, dynamic=True)
    for tasks in (7, 2):
        batch = batch_of(learner, "mlp", device, tasks)
        hold_together(
            gradient(step, learner, batch), gradient(step_of(learner), learner, batch), EXACT
        )
    assert graphs() == 1


def test_an_import_in_inference_mode_leaves_its_dispatch_outside():
    code = """
import torch
with torch.inference_mode():
    from fastmeta.learners import _compile
print(_compile._PLAIN)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(_compile._PLAIN)


@pytest.mark.parametrize("dynamic", [None, True])
def test_learners_take_turns_in_a_compiled_function(dynamic, device):
    torch._dynamo.reset()
    learners = [fm.MAML(build("mlp", device), lr) for lr in (0.1, 0.5)]
    tasks = classification("mlp", device)
    compiled = torch.compile(
        lambda learner: learner.meta_loss(*tasks)[0],
        fullgraph=True,
        dynamic=dynamic,
        backend="aot_eager",
    )
    for learner in (*learners, *learners):
        assert relative_error(compiled(learner), learner.meta_loss(*tasks)[0]) < EXACT
    torch._dynamo.reset()
