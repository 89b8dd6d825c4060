"""Clones of learners and of the stand-ins; modules that cannot be copied."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta as fm
from fastmeta.compat import higher
from fastmeta.compat import learn2learn as l2l
from tests.helpers.networks import Tasks, build, classification, joined, relative_error
from tests.helpers.unrolled import meta_gradient

EXACT = 1e-10


def of_fastmeta(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    learner = fm.MAML(net, 0.1).clone()
    learner.adapt(F.cross_entropy(learner(x), y))
    return F.cross_entropy(learner(x), y)


def of_learn2learn(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    learner = l2l.algorithms.MAML(net, 0.1).clone()
    learner.adapt(F.cross_entropy(learner(x), y))
    return F.cross_entropy(learner(x), y)


def of_higher(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    context = higher.innerloop_ctx(net, optimizer, copy_initial_weights=False)
    with context as (functional, steps):
        steps.step(F.cross_entropy(functional(x), y))
        return F.cross_entropy(functional(x), y)


@pytest.mark.parametrize("clone", [of_fastmeta, of_learn2learn, of_higher])
def test_clones_of_networks_with_attention_have_second_derivatives(clone):
    """Flash attention, the default on a CPU, has none."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    net = nn.Sequential(layer, nn.Flatten(), nn.Linear(24, 3)).double()
    x, y = torch.randn(4, 3, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    clone(net, x, y).backward()
    found = joined([p.grad for p in net.parameters()])
    tasks = Tasks(x[None], y[None], x[None], y[None])
    rate = torch.tensor(0.1, dtype=torch.float64)
    expected = meta_gradient(net, tasks, F.cross_entropy, rate, 1)
    assert relative_error(found, joined(expected.params.values())) < EXACT


def test_a_compiled_module_stands_for_its_original(device):
    net, tasks = build("mlp", device), classification("mlp", device)
    for learner in (fm.MAML(torch.compile(net), 0.1), fm.MAML(torch.compile(net), 0.1).clone()):
        assert type(learner.module) is type(net)
    learner = fm.MAML(torch.compile(net), 0.1)
    assert learner.module is net
    assert learner.explain() == fm.MAML(net, 0.1).explain()
    found, expected = learner.meta_gradient(*tasks), fm.MAML(net, 0.1).meta_gradient(*tasks)
    assert torch.equal(found.grads, expected.grads)
    body = fm.ANIL(torch.compile(nn.Flatten()), nn.Linear(3, 2)).body
    assert type(body) is nn.Flatten


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (torch.jit.script, "model: expected a plain nn.Module, got a RecursiveScriptModule"),
        (
            lambda net: torch.jit.trace(net, torch.zeros(1, 3)),
            "model: expected a plain nn.Module, got a TopLevelTracedModule",
        ),
        (
            lambda net: nn.Sequential(torch.compile(net), nn.ReLU()),
            r"model.0: expected a plain nn.Module, got the result of torch.compile; give mod",
        ),
        (
            lambda net: nn.Sequential(torch.jit.script(net)),
            "model.0: expected a plain nn.Module, got a RecursiveScriptModule, which cannot be",
        ),
    ],
)
def test_modules_that_cannot_be_copied(make, message):
    with pytest.raises(TypeError, match=message):
        fm.MAML(make(nn.Linear(3, 2)))
