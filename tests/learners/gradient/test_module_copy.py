"""learn2learn's calls: clone and adapt."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta as fm
from fastmeta.learners.gradient._module_copy import clone_module
from tests.helpers.networks import (
    NETWORKS,
    Recurrent,
    Shared,
    Tasks,
    TwoHeads,
    build,
    classification,
    half_frozen,
    joined,
    relative_error,
)
from tests.helpers.unrolled import twice_differentiable

EXACT = 1e-10


def looped_meta_loss(maml: fm.MAML, tasks: Tasks) -> Tensor:
    """The meta-loss by clone and adapt, one task at a time."""
    losses = []
    for support_x, support_y, query_x, query_y in zip(*tasks, strict=True):
        learner = maml.clone()
        for _ in range(maml.steps):
            learner.adapt(F.cross_entropy(learner(support_x), support_y))
        losses.append(F.cross_entropy(learner(query_x), query_y))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_clone_and_adapt_give_the_engines_meta_gradient(name, first_order, device):
    net, tasks = build(name, device), classification(name, device)
    lr = torch.linspace(0.01, 0.1, sum(p.numel() for p in net.parameters()), device=device)
    maml = fm.MAML(net, lr, 2, first_order, learn_lr=True)
    loss, _ = maml.meta_loss(*tasks)
    expected = joined(torch.autograd.grad(loss, list(maml.parameters())))
    with twice_differentiable():
        looped = looped_meta_loss(maml, tasks)
        actual = joined(torch.autograd.grad(looped, list(maml.parameters())))
    assert relative_error(looped, loss) < EXACT
    assert relative_error(actual, expected) < EXACT


@pytest.mark.parametrize("kind", ["number", "scalar", "layer", "names"])
def test_adapt_takes_every_form_of_step_size(kind, device):
    net, tasks = build("mlp", device), classification("mlp", device)
    names = [name for name, _ in net.named_parameters()]
    vector = torch.linspace(0.01, 0.1, len(names), dtype=torch.float64, device=device)
    forms = {
        "number": 0.1,
        "scalar": torch.tensor(0.1, device=device),
        "layer": vector,
        "names": dict(zip(names, vector, strict=True)),
    }
    maml = fm.MAML(net, forms[kind], 2)
    assert relative_error(looped_meta_loss(maml, tasks), maml.meta_loss(*tasks)[0]) < EXACT


def support_loss(learner: fm.MAML, tasks: Tasks) -> Tensor:
    return F.cross_entropy(learner(tasks.support_x[0]), tasks.support_y[0])


@pytest.mark.parametrize("where", ["constructor", "clone", "adapt"])
def test_first_order_can_be_chosen_at_every_call(where, device):
    net, tasks = build("mlp", device), classification("mlp", device)

    def gradient(constructor: bool, clone: bool | None, adapt: bool | None) -> Tensor:
        maml = fm.MAML(net, 0.1, first_order=constructor)
        learner = maml.clone(first_order=clone)
        learner.adapt(support_loss(learner, tasks), first_order=adapt)
        loss = F.cross_entropy(learner(tasks.query_x[0]), tasks.query_y[0])
        return joined(torch.autograd.grad(loss, list(net.parameters())))

    second, first = gradient(False, None, None), gradient(True, None, None)
    assert relative_error(first, second) > 1e-6
    chosen = {"constructor": (True, None, None), "clone": (False, True, None)}
    assert torch.equal(gradient(*chosen.get(where, (False, None, True))), first)
    undone = {"constructor": (False, None, None), "clone": (True, False, None)}
    assert torch.equal(gradient(*undone.get(where, (True, None, False))), second)


def test_first_order_builds_no_graph_and_frees_that_of_the_loss(device):
    modes = []

    class Spy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x * 1

        @staticmethod
        def backward(ctx, grad: Tensor) -> Tensor:
            modes.append(torch.is_grad_enabled())
            return grad

    tasks = classification("mlp", device)
    for first_order in (True, False):
        learner = fm.MAML(build("mlp", device), 0.1, first_order=first_order).clone()
        loss = F.cross_entropy(Spy.apply(learner(tasks.support_x[0])), tasks.support_y[0])
        learner.adapt(loss)
        if first_order:
            with pytest.raises(RuntimeError, match="backward through the graph a second time"):
                loss.backward()
        else:
            loss.backward()
    assert modes == [False, True, True] or modes == [False, True, False]


@pytest.mark.parametrize("where", ["constructor", "clone", "adapt"])
def test_frozen_parameters_need_allow_nograd(where, device):
    tasks = classification("mlp", device)
    net = half_frozen(device)

    def adapted(allow: bool) -> fm.MAML:
        maml = fm.MAML(net, 0.1, allow_nograd=allow and where == "constructor")
        learner = maml.clone(allow_nograd=allow if where == "clone" else None)
        learner.adapt(
            support_loss(learner, tasks), allow_nograd=allow if where == "adapt" else None
        )
        return learner

    with pytest.raises(ValueError, match=r"\['0.weight'\] do not require .* allow_nograd=True"):
        adapted(False)
    learner = adapted(True)
    assert torch.equal(learner.module[0].weight, net[0].weight)
    assert not torch.equal(learner.module[2].weight, net[2].weight)
    expected = fm.MAML(net, 0.1).adapt_tasks(*tasks[:2]).task(0)
    assert relative_error(learner.module[2].weight, expected["2.weight"]) < EXACT


@pytest.mark.parametrize("where", ["constructor", "clone", "adapt"])
def test_unused_parameters_need_allow_unused(where, device):
    net, tasks = TwoHeads().double().to(device), classification("mlp", device)

    def adapted(allow: bool) -> fm.MAML:
        maml = fm.MAML(net, 0.1, allow_unused=allow if where == "constructor" else None)
        learner = maml.clone(allow_unused=allow if where == "clone" else None)
        learner.adapt(
            support_loss(learner, tasks), allow_unused=allow if where == "adapt" else None
        )
        return learner

    with pytest.raises(ValueError, match=r"\['unused.weight', .* allow_unused=True"):
        adapted(False)
    learner = adapted(True)
    assert torch.equal(learner.module.unused.weight, net.unused.weight)
    assert not torch.equal(learner.module.used.weight, net.used.weight)


def test_allow_unused_follows_allow_nograd_unless_it_is_given(device):
    net, tasks = TwoHeads().double().to(device), classification("mlp", device)
    learner = fm.MAML(net, 0.1, allow_nograd=True).clone()
    learner.adapt(support_loss(learner, tasks))
    strict = fm.MAML(net, 0.1, allow_nograd=True, allow_unused=False).clone()
    with pytest.raises(ValueError, match="allow_unused=True"):
        strict.adapt(support_loss(strict, tasks))


def test_a_clone_leaves_the_original_alone(device):
    net = build("conv4", device)
    before = copy.deepcopy(net.state_dict())
    maml, tasks = fm.MAML(net, 0.1), classification("conv4", device)
    learner = maml.clone()
    learner.adapt(support_loss(learner, tasks))
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert learner.module[1].num_batches_tracked == 1
    assert all(isinstance(parameter, nn.Parameter) for parameter in net.parameters())


def test_a_clone_of_a_clone_reaches_the_original(device):
    net, tasks = build("mlp", device), classification("mlp", device)
    maml = fm.MAML(net, 0.1)
    outer = maml.clone()
    outer.adapt(support_loss(outer, tasks))
    inner = outer.clone()
    inner.adapt(support_loss(inner, tasks))
    between = [p.detach().clone() for p in outer.module.parameters()]
    loss = F.cross_entropy(inner(tasks.query_x[0]), tasks.query_y[0])
    actual = joined(torch.autograd.grad(loss, list(net.parameters())))
    assert all(torch.equal(p, b) for p, b in zip(outer.module.parameters(), between, strict=True))

    first = Tasks(*(tensor[:1] for tensor in tasks))
    value, _ = fm.MAML(net, 0.1, steps=2).meta_loss(*first)
    assert (
        relative_error(actual, joined(torch.autograd.grad(value, list(net.parameters())))) < EXACT
    )


def test_a_clone_without_gradients_still_runs(device):
    maml, tasks = fm.MAML(build("mlp", device)), classification("mlp", device)
    with torch.no_grad():
        learner = maml.clone()
        assert torch.equal(learner(tasks.query_x[0]), maml(tasks.query_x[0]))


def test_a_clone_keeps_subclass_and_options(device):
    class Special(fm.MAML):
        pass

    maml = Special(build("mlp", device), 0.1, 3, True, task_chunk=2, learn_lr=True)
    learner = maml.clone()
    assert type(learner) is Special
    assert (learner.steps, learner.first_order, learner.task_chunk) == (3, True, 2)
    assert learner.lr is maml.lr
    learner.first_order = False
    assert maml.first_order


def test_what_is_shared_in_a_module_is_shared_in_its_clone():
    net = Shared()
    twin = clone_module(net)
    assert twin.first is twin.again
    assert twin.third.weight is twin.first.weight
    assert twin.third.shift is twin.shift
    assert twin.first is not net.first
    assert twin.shift is not net.shift


def test_tied_parameters_are_adapted_as_one(device):
    net, tasks = Shared().double().to(device), classification("mlp", device)
    tasks = tasks._replace(support_y=tasks.support_y % 3, query_y=tasks.query_y % 3)
    maml = fm.MAML(net, 0.1)
    learner = maml.clone()
    learner.adapt(support_loss(learner, tasks))
    expected = maml.adapt_tasks(*tasks[:2]).task(0)
    assert learner.module.third.weight is learner.module.first.weight
    assert relative_error(learner.module.first.weight, expected["first.weight"]) < EXACT


@pytest.mark.parametrize("layer", [nn.GRU, nn.LSTM])
def test_recurrent_clones_use_their_adapted_weights(layer, device):
    torch.manual_seed(0)
    net, tasks = Recurrent(layer).double().to(device), classification("gru", device)
    maml = fm.MAML(net, 0.1)
    learner = maml.clone()
    net(tasks.query_x[0])
    learner.adapt(support_loss(learner, tasks))
    expected = maml.adapt_tasks(*tasks[:2])(tasks.query_x)[0]
    assert relative_error(learner(tasks.query_x[0]), expected) < EXACT


def test_hooks_of_a_clone_are_its_own(device):
    net = build("mlp", device)
    calls = []
    net.register_forward_hook(lambda *_: calls.append("original"))
    twin = clone_module(net)
    twin.register_forward_hook(lambda *_: calls.append("clone"))
    net(torch.zeros(1, 3, dtype=torch.float64, device=device))
    assert calls == ["original"]
    twin(torch.zeros(1, 3, dtype=torch.float64, device=device))
    assert calls == ["original", "original", "clone"]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_takes_the_step_size_in_full_and_stays_half(dtype, seed, device):
    torch.manual_seed(seed)
    net = nn.Linear(3, 4).to(device, dtype)
    x, y = (
        torch.ones(2, 3, device=device, dtype=dtype),
        torch.zeros(2, 4, device=device, dtype=dtype),
    )
    learner = fm.MAML(net, 0.1234, loss=F.mse_loss).clone()
    loss = F.mse_loss(learner(x), y)
    (grad,) = torch.autograd.grad(loss, [learner.module.weight], retain_graph=True)
    learner.adapt(loss)
    expected = (net.weight.float() - 0.1234 * grad.float()).to(dtype)
    assert torch.equal(learner.module.weight, expected)
