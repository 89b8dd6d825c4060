"""Learners whose meta-gradients are replayed from CUDA graphs, on fakes of torch.cuda."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastmeta as fm
from fastmeta.core import cuda_graphs as _graphs
from fastmeta.core.cuda_graphs import CALLS
from fastmeta.engines.program import engine as program
from fastmeta.engines.program import explain
from tests.helpers.fake_graphs import Graph, capture, gpu, replays
from tests.helpers.networks import Tasks, build, classification

__all__ = ["gpu"]

pytestmark = [
    pytest.mark.usefixtures("gpu"),
    pytest.mark.skipif(
        (fm.core.backend.PROGRAM, "cpu") not in fm.core.backend.KERNELS,
        reason="needs the compiled extension",
    ),
]

NETWORK = "conv4"


def learner(name: str = NETWORK, **options: Any) -> fm.MAML:
    return fm.MAML(build(name, "cpu"), 0.1, 2, **options)


def batch(seed: int = 0, **options: Any) -> Tasks:
    tasks = classification(NETWORK, "cpu", **options)
    generator = torch.Generator().manual_seed(seed)
    x = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in tasks[::2]]
    return Tasks(x[0], tasks.support_y, x[1], tasks.query_y)


def by_autograd(maml: fm.MAML, tasks: Tasks) -> list[Tensor]:
    maml.zero_grad()
    loss, outputs = maml.meta_loss(*tasks)
    loss.backward()
    grads = (p.grad for p in maml.parameters() if p.requires_grad)
    return [loss.detach(), outputs, *grads]


def as_values(maml: fm.MAML, tasks: Tasks) -> list[Tensor]:
    loss, outputs, grads, lr_grad, *_ = maml.meta_gradient(*tasks)
    return [value for value in (loss, outputs, grads, lr_grad) if value is not None]


def step(maml: fm.MAML) -> None:
    with torch.no_grad():
        for p in maml.module.parameters():
            p += 0.1 * torch.randn(p.shape, dtype=p.dtype)


@pytest.mark.parametrize("way", [by_autograd, as_values])
@pytest.mark.parametrize("learn_lr", [False, True])
def test_meta_gradients_as_graphs_are_the_same_bits(way, learn_lr):
    maml = learner(learn_lr=learn_lr)
    plain, found = learner(cuda_graph=False, learn_lr=learn_lr), []
    for seed in range(6):
        step(maml)
        plain.load_state_dict(maml.state_dict())
        if learn_lr:
            maml.lr.data += 0.01
            plain.lr.data += 0.01
        found.append((way(maml, batch(seed)), way(plain, batch(seed))))
    for actual, expected in found:
        assert len(actual) == len(expected) > 2
        assert all(map(torch.equal, actual, expected))
    assert replays() == [4]


def test_the_options_of_a_call_are_part_of_its_kind():
    maml = learner(cuda_graph=True)
    x = batch()._replace(query_x=batch().query_x.clone().requires_grad_())
    calls = (
        lambda: maml.meta_loss(*batch()),
        lambda: maml.meta_loss(*batch(), [0.5, 0.5]),
        lambda: maml.meta_loss(*batch(), [0.25, 0.75]),
        lambda: maml.meta_loss(*x),
    )
    expected = learner(cuda_graph=False)
    weighted = expected.meta_loss(*batch(), [0.25, 0.75])[0]
    for call in calls:
        call()
    assert replays() == [1, 1, 1, 1]
    assert torch.equal(calls[2]()[0], weighted)
    loss, _ = calls[3]()
    (grad,) = torch.autograd.grad(loss, x.query_x)
    assert torch.equal(grad, torch.autograd.grad(expected.meta_loss(*x)[0], x.query_x)[0])
    with torch.no_grad():
        assert torch.equal(calls[0]()[0], expected.meta_loss(*batch())[0])
    assert replays() == [1, 1, 2, 2, 1]


def with_start(maml: fm.MAML, tasks: Tasks) -> list[Tensor]:
    maml.zero_grad()
    start = torch.linspace(-1, 1, maml.layout.numel, dtype=torch.float64).requires_grad_()
    loss, outputs = maml.meta_loss(*tasks, start=start)
    loss.backward()
    shared = [p.grad for p in maml.module.parameters() if p.grad is not None]
    return [loss.detach(), outputs, start.grad, *shared]


def shared_as_values(maml: fm.MAML, tasks: Tasks) -> list[Tensor]:
    result = maml.meta_gradient(*tasks)
    return [result.loss, result.outputs, result.grads, *result.shared_grads.values()]


@pytest.mark.parametrize("way", [by_autograd, shared_as_values, with_start])
@pytest.mark.parametrize("adapt", ["17.*", "0.*", "*bias"])
def test_replays_read_the_shared_and_the_frozen_parameters(adapt, way):
    """Which change between the calls, by a step and by another tensor as data."""
    maml, plain = learner(adapt=adapt), learner(adapt=adapt, cuda_graph=False)
    for each in (maml, plain):
        each.module[5].weight.requires_grad_(False)
    found = []
    for seed in range(6):
        step(maml)
        if seed == 4:
            for p in maml.module.parameters():
                p.data = p.data + 0.1
        plain.load_state_dict(maml.state_dict())
        found.append((way(maml, batch(seed)), way(plain, batch(seed))))
        # Results of earlier calls are the caller's: no replay writes into them.
        assert all(all(map(torch.equal, actual, expected)) for actual, expected in found)
    assert len(found[0][0]) > 3
    assert replays() == [4]


def test_what_is_adapted_is_part_of_a_graph_s_kind():
    maml = learner(adapt="17.*", cuda_graph=True)
    maml.meta_loss(*batch())
    maml.adapted_names = ("0.weight", "0.bias")
    expected = learner(adapt="0.*", cuda_graph=False)
    for _ in range(2):
        results = [as_values(each, batch(1)) for each in (maml, expected)]
        assert all(map(torch.equal, *results))
    assert replays() == [1, 2]


@pytest.mark.parametrize("name", ["support_y", "query_y"])
@pytest.mark.parametrize("way", [by_autograd, as_values])
def test_labels_are_checked_before_each_replay(way, name):
    maml = learner(cuda_graph=True)
    expected = way(maml, batch())
    wrong = batch(1)._replace(**{name: getattr(batch(), name) + 4})
    with pytest.raises(ValueError, match=f"{name}: expected labels in 0..3"):
        way(maml, wrong)
    assert replays() == [1]
    assert all(map(torch.equal, way(maml, batch()), expected))


def test_graphs_go_with_the_state_of_the_module():
    maml = learner(cuda_graph=True)
    maml.meta_loss(*batch())
    assert len(maml._programs.graphs) == 1
    maml.module[0].weight.requires_grad_(False)
    actual, _ = maml.meta_loss(*batch())
    assert replays() == [1, 1] and len(maml._programs.graphs) == 1
    maml.cuda_graph = False
    assert torch.equal(actual, maml.meta_loss(*batch())[0])
    assert replays() == [1, 1]


def test_a_copy_has_no_graphs():
    maml = learner(cuda_graph=True)
    expected, _ = maml.meta_loss(*batch())
    for twin in (copy.deepcopy(maml), pickle.loads(pickle.dumps(maml)), maml.clone()):
        assert len(twin._programs.graphs) == 0 and twin.cuda_graph is True
    other = copy.deepcopy(maml)
    step(other)
    assert other.meta_loss(*batch())[0] != expected
    assert replays() == [1, 1]
    assert torch.equal(maml.meta_loss(*batch())[0], expected)


def test_other_batches_between_and_the_prepared_way():
    maml, plain = learner(), learner(cuda_graph=False)
    sizes = [3, 3, 3, 3, 2, 3, 2, 2, 2]
    for seed, tasks in enumerate(sizes):
        data = batch(seed, tasks=tasks)
        assert all(map(torch.equal, as_values(maml, data), as_values(plain, data)))
    assert replays() == [3, 1]


def test_auto_leaves_out_programs_of_few_launches():
    tasks = classification("mlp", "cpu")
    maml = learner("mlp")
    for _ in range(CALLS + 1):
        maml.meta_loss(*tasks)
    assert not Graph.made
    assert "No CUDA graph: the program is a few launches" in maml.explain()
    maml.cuda_graph = True
    maml.meta_loss(*tasks)
    assert replays() == [1]
    wide = fm.MAML(fm.models.MLP([3, 200, 200, 4]).double())
    assert "from call 3 in a row of a kind on; 0 now." in wide.explain()


def test_explain_says_what_is_captured_and_what_could_not_be():
    maml = learner()
    for _ in range(CALLS):
        maml.meta_loss(*batch())
    assert "Meta-losses are CUDA graphs from call 3 in a row of a kind on; 1 now." in maml.explain()
    capture.error = RuntimeError("no memory")
    for _ in range(CALLS):
        maml.meta_loss(*batch(tasks=2))
    assert maml.explain().endswith("; 1 now. Launched instead, as it failed: no memory.")
    assert "from the first call of" in learner(cuda_graph=True).explain()
    assert "of at most 2 tasks, on" in learner(task_chunk=2).explain()
    assert "CUDA" not in learner(cuda_graph=False).explain()


REFUSED = {
    "there is no task program: model.2 is a Softmax": lambda: fm.MAML(
        nn.Sequential(nn.Flatten(), nn.Linear(256, 4), nn.Softmax(1)).double(), cuda_graph=True
    ),
    "does not run as one compiled call for all tasks": lambda: learner(
        cuda_graph=True, task_chunk=2
    ),
}


@pytest.mark.parametrize("words", REFUSED)
def test_true_raises_where_there_can_be_no_graph(words):
    maml, tasks = REFUSED[words](), batch()
    for method in (maml.meta_loss, maml.meta_gradient):
        with pytest.raises(ValueError, match=f"cuda_graph=True: .*{words}"):
            method(*tasks)
    with torch.no_grad():
        assert maml.adapt_tasks(*tasks[:2]).params.shape[0] == 3
    maml.cuda_graph = "auto"
    assert maml.meta_loss(*tasks)[0].isfinite()
    assert not Graph.made


def test_on_the_cpu_auto_does_nothing_and_true_raises(monkeypatch):
    for module in (_graphs, program, explain):
        monkeypatch.setattr(module, "DEVICE_TYPE", "cuda")
    maml = learner()
    for _ in range(CALLS + 1):
        maml.meta_loss(*batch())
    assert not Graph.made and "CUDA" not in maml.explain()
    maml.cuda_graph = True
    with pytest.raises(ValueError, match="cuda_graph=True: the parameters are on cpu"):
        maml.meta_gradient(*batch())
    assert "cuda_graph=True, but the parameters are on cpu." in maml.explain()


def test_the_option_is_checked():
    with pytest.raises(ValueError, match="cuda_graph: expected 'auto', True or False, got 1"):
        learner(cuda_graph=1)
    with pytest.raises(ValueError, match="cuda_graph: expected False or 'auto' with"):
        learner(cuda_graph=True, engine="functional")
    with pytest.raises(ValueError, match="cuda_graph: expected"):
        program.ProgramOptions(cuda_graph="always")
