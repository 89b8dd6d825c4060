"""The stand-in for learn2learn against an unrolled loop, and where learn2learn is particular."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta.compat.learn2learn as l2l
from tests.helpers.networks import (
    NETWORKS,
    Shared,
    Tasks,
    TwoHeads,
    build,
    classification,
    half_frozen,
    joined,
    relative_error,
)
from tests.helpers.unrolled import meta_gradient, twice_differentiable

EXACT = 1e-10
LEARNERS = [l2l.algorithms.MAML, l2l.algorithms.MetaSGD]


def meta_loss(learner, tasks: Tasks, steps: int) -> Tensor:
    losses = []
    for support_x, support_y, query_x, query_y in zip(*tasks, strict=True):
        task = learner.clone()
        for _ in range(steps):
            task.adapt(F.cross_entropy(task(support_x), support_y))
        losses.append(F.cross_entropy(task(query_x), query_y))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_maml_gives_the_unrolled_gradient(name, first_order, device):
    net, tasks = build(name, device), classification(name, device)
    lr = torch.tensor(0.1, dtype=torch.float64, device=device)
    expected = meta_gradient(net, tasks, F.cross_entropy, lr, 3, first_order)
    with twice_differentiable():
        loss = meta_loss(l2l.algorithms.MAML(net, 0.1, first_order), tasks, 3)
        actual = torch.autograd.grad(loss, list(net.parameters()))
    assert relative_error(loss, expected.loss) < EXACT
    assert relative_error(joined(actual), joined(expected.params.values())) < EXACT


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_meta_sgd_gives_the_unrolled_gradient_to_parameters_and_step_sizes(
    name, first_order, device
):
    net, tasks = build(name, device), classification(name, device)
    lr = torch.linspace(0.01, 0.1, sum(p.numel() for p in net.parameters()), device=device)
    lr = lr.double()
    expected = meta_gradient(net, tasks, F.cross_entropy, lr, 3, first_order)
    meta = l2l.algorithms.MetaSGD(net, first_order=first_order)
    with torch.no_grad():
        nn.utils.vector_to_parameters(lr, meta.lrs)
    with twice_differentiable():
        loss = meta_loss(meta, tasks, 3)
        to_params = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
        to_lrs = torch.autograd.grad(loss, list(meta.lrs))
    assert relative_error(loss, expected.loss) < EXACT
    assert relative_error(joined(to_params), joined(expected.params.values())) < EXACT
    assert relative_error(joined(to_lrs), expected.lr) < EXACT


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_learned_step_size_gets_its_gradient(shape, device):
    net, tasks = build("mlp", device), classification("mlp", device)
    lr = nn.Parameter(torch.full(shape, 0.1, dtype=torch.float64, device=device))
    maml = l2l.algorithms.MAML(net, lr)
    assert any(p is lr for p in maml.parameters())
    meta_loss(maml, tasks, 2).backward()
    expected = meta_gradient(net, tasks, F.cross_entropy, lr.detach().reshape(()), 2)
    assert relative_error(lr.grad.reshape(()), expected.lr) < EXACT


def support_loss(learner, tasks: Tasks) -> Tensor:
    return F.cross_entropy(learner(tasks.support_x[0]), tasks.support_y[0])


@pytest.mark.parametrize("kind", LEARNERS)
def test_first_order_at_a_step(kind, device):
    tasks = classification("mlp", device)

    def gradient(first: bool, step: bool | None) -> Tensor:
        net = build("mlp", device)
        learner = kind(net, 0.1, first_order=first).clone()
        learner.adapt(support_loss(learner, tasks), first_order=step)
        return joined(torch.autograd.grad(support_loss(learner, tasks), list(net.parameters())))

    assert torch.equal(gradient(False, True), gradient(True, None))
    assert torch.equal(gradient(True, False), gradient(False, None))
    assert relative_error(gradient(True, None), gradient(False, None)) > 1e-6


@pytest.mark.parametrize("kind", LEARNERS)
def test_running_statistics_of_clones_are_those_of_the_original(kind, device):
    net, tasks = build("conv4", device), classification("conv4", device)
    plain = copy.deepcopy(net)
    plain(tasks.support_x[0])
    learner = kind(net, 0.1).clone()
    learner(tasks.support_x[0])
    for name, buffer in net.named_buffers():
        assert torch.equal(buffer, plain.get_buffer(name)), name


def test_a_buffer_that_requires_gradients_is_cloned(device):
    net = nn.Linear(2, 2).to(device)
    net.register_buffer("scale", torch.ones(2, device=device, requires_grad=True))
    clone = l2l.clone_module(net)
    clone.scale.sum().backward()
    assert clone.scale is not net.scale
    assert torch.equal(net.scale.grad, torch.ones(2, device=device))


@pytest.mark.parametrize("kind", LEARNERS)
def test_tied_parameters_stay_tied(kind, device):
    net, tasks = Shared().double().to(device), classification("mlp", device)
    tasks = tasks._replace(support_y=tasks.support_y % 3, query_y=tasks.query_y % 3)
    learner = kind(net, 0.1)
    actual = torch.autograd.grad(meta_loss(learner, tasks, 2), list(net.parameters()))

    def shared(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(F.linear(F.linear(x, weight, bias), weight, bias), weight) + 1

    losses = []
    for support_x, support_y, query_x, query_y in zip(*tasks, strict=True):
        params = list(net.parameters())
        for _ in range(2):
            loss = F.cross_entropy(shared(support_x, *params), support_y)
            grads = torch.autograd.grad(loss, params, create_graph=True)
            params = [p - 0.1 * g for p, g in zip(params, grads, strict=True)]
        losses.append(F.cross_entropy(shared(query_x, *params), query_y))
    expected = torch.autograd.grad(torch.stack(losses).mean(), list(net.parameters()))
    assert relative_error(joined(actual), joined(expected)) < EXACT
    task = learner.clone()
    task.adapt(support_loss(task, tasks))
    assert task.module.first.weight is task.module.third.weight


@pytest.mark.parametrize("where", ["constructor", "clone", "adapt"])
def test_frozen_parameters_need_allow_nograd(where, device):
    net, tasks = half_frozen(device), classification("mlp", device)

    def adapted(allow: bool) -> l2l.algorithms.MAML:
        maml = l2l.algorithms.MAML(net, 0.1, allow_nograd=allow and where == "constructor")
        learner = maml.clone(allow_nograd=allow if where == "clone" else None)
        loss = support_loss(learner, tasks)
        learner.adapt(loss, allow_nograd=allow if where == "adapt" else None)
        return learner

    with pytest.raises(ValueError, match=r"\['0.weight'\] do not require .* allow_nograd=True"):
        adapted(False)
    learner = adapted(True)
    assert torch.equal(learner.module[0].weight, net[0].weight)
    assert not torch.equal(learner.module[2].weight, net[2].weight)


@pytest.mark.parametrize("where", ["constructor", "clone", "adapt"])
def test_unused_parameters_need_allow_unused(where, device):
    net, tasks = TwoHeads().double().to(device), classification("mlp", device)

    def adapted(allow: bool) -> l2l.algorithms.MAML:
        maml = l2l.algorithms.MAML(net, 0.1, allow_unused=allow if where == "constructor" else None)
        learner = maml.clone(allow_unused=allow if where == "clone" else None)
        loss = support_loss(learner, tasks)
        learner.adapt(loss, allow_unused=allow if where == "adapt" else None)
        return learner

    with pytest.raises(ValueError, match=r"\['unused.weight', .* allow_unused=True"):
        adapted(False)
    learner = adapted(True)
    assert torch.equal(learner.module.unused.weight, net.unused.weight)
    assert not torch.equal(learner.module.used.weight, net.used.weight)


def test_allow_unused_follows_allow_nograd():
    assert l2l.algorithms.MAML(nn.Linear(1, 1), 0.1, allow_nograd=True).allow_unused
    assert not l2l.algorithms.MAML(nn.Linear(1, 1), 0.1, False, False, True).allow_unused


@pytest.mark.parametrize("net", [half_frozen, lambda device: TwoHeads().double().to(device)])
def test_meta_sgd_refuses_frozen_and_unused_parameters(net, device):
    learner = l2l.algorithms.MetaSGD(net(device), 0.1).clone()
    with pytest.raises(ValueError, match=r"(do not require gradients|not used by the loss)$"):
        learner.adapt(support_loss(learner, classification("mlp", device)))


@pytest.mark.parametrize("kind", LEARNERS)
def test_evaluation_without_gradients(kind, device):
    tasks = classification("mlp", device)
    learner = kind(build("mlp", device), 0.1).clone()
    learner.adapt(support_loss(learner, tasks))
    with torch.no_grad():
        assert not learner(tasks.query_x[0]).requires_grad
        fresh = kind(build("mlp", device), 0.1).clone()
        with pytest.raises(ValueError, match=r"loss: expected one .* with gradients enabled"):
            fresh.adapt(support_loss(fresh, tasks))


@pytest.mark.parametrize("kind", LEARNERS)
def test_learners_are_saved_copied_and_pickled(kind, device):
    net, tasks = build("conv4", device), classification("conv4", device)
    learner = kind(net, 0.1)
    names = {f"module.{name}" for name in net.state_dict()}
    lrs = {f"lrs.{i}" for i in range(len(list(net.parameters())))}
    assert set(learner.state_dict()) == (names | lrs if kind is LEARNERS[1] else names)
    expected = meta_loss(copy.deepcopy(learner), tasks, 2)
    again = kind(build("conv4", device, seed=1), 0.3)
    again.load_state_dict(learner.state_dict())
    for other in (pickle.loads(pickle.dumps(learner)), *([again] if kind is LEARNERS[1] else [])):
        assert torch.equal(meta_loss(other, tasks, 2), expected)


def test_a_learner_has_the_attributes_of_its_module():
    class Policy(nn.Linear):
        def log_prob(self, x: Tensor) -> Tensor:
            return self(x).log_softmax(-1)

    maml = l2l.algorithms.MAML(Policy(2, 2), 0.1)
    x = torch.ones(1, 2)
    assert torch.equal(maml.clone().log_prob(x), maml.module.log_prob(x))
    assert maml.in_features == 2
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        maml.nothing  # noqa: B018


def test_forward_takes_any_arguments():
    class Affine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor, *, shift: Tensor) -> dict[str, Tensor]:
            return {"y": self.a * x + shift}

    learner = l2l.algorithms.MAML(Affine(), 0.5).clone()
    one = torch.ones(())
    learner.adapt(learner(one, shift=one)["y"])
    assert learner(one, shift=one)["y"].item() == 1.5


def test_a_memo_ties_modules_that_are_cloned_and_updated_one_by_one():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.weight = first.weight
    memo: dict = {}
    one, two = l2l.clone_module(first, memo), l2l.clone_module(second, memo)
    assert one.weight is two.weight
    assert one.bias is not two.bias
    new: dict = {}
    l2l.update_module(one, [torch.ones(2, 2), None], new)
    l2l.update_module(two, [torch.ones(2, 2), None], new)
    assert one.weight is two.weight
    assert torch.equal(one.weight, first.weight + 1)
    assert torch.equal(two.bias, second.bias)


def test_update_module_takes_attributes_of_parameters_and_buffers():
    clone = l2l.clone_module(nn.BatchNorm1d(2))
    before = clone.running_mean
    clone.weight.update = torch.ones(2)
    before.update = torch.full((2,), 3.0)
    assert l2l.update_module(clone) is clone
    assert clone.weight.tolist() == [2.0, 2.0]
    assert clone.running_mean.tolist() == [3.0, 3.0]
    assert before.tolist() == [0.0, 0.0]
    assert before.update is None
    assert l2l.update_module(clone).weight.tolist() == [2.0, 2.0]


@pytest.mark.parametrize("keep", [False, True])
def test_detach_module(keep, device):
    net = half_frozen(device)
    learner = l2l.algorithms.MAML(net, 0.1, allow_nograd=True).clone()
    learner.adapt(support_loss(learner, classification("mlp", device)))
    assert l2l.detach_module(learner, keep_requires_grad=keep) is None
    for (name, p), q in zip(learner.module.named_parameters(), net.parameters(), strict=True):
        assert p.is_leaf, name
        assert p.requires_grad == (keep and q.requires_grad), name


@pytest.mark.parametrize("update", [l2l.algorithms.maml_update, l2l.algorithms.meta_sgd_update])
def test_updates_by_hand(update):
    net = nn.Linear(2, 1)
    clone = l2l.clone_module(net)
    grads = torch.autograd.grad(clone(torch.ones(1, 2)).sum(), clone.parameters())
    lr = 0.5 if update is l2l.algorithms.maml_update else [torch.full_like(g, 0.5) for g in grads]
    assert update(clone, lr, [grads[0], None]) is clone
    assert torch.equal(clone.weight, net.weight - 0.5)
    assert torch.equal(clone.bias, net.bias)
    with pytest.raises(ValueError, match="grads: expected one a parameter, 2, got 1"):
        update(clone, lr, grads[:1])


def test_updates_by_hand_from_attributes():
    net = nn.Linear(2, 1)
    net(torch.ones(1, 2)).sum().backward()
    lrs = [torch.ones_like(p) for p in net.parameters()]
    weight, bias = net.weight, net.bias
    with pytest.raises(ValueError, match="lrs: expected one a parameter, 2, got 1"):
        l2l.algorithms.meta_sgd_update(net, lrs[:1])
    assert torch.equal(l2l.algorithms.meta_sgd_update(net, lrs).weight, weight - 1)
    net.bias.update = torch.ones(1)
    assert torch.equal(l2l.algorithms.maml_update(net, 9.0).bias, bias - 1 + 1)


def test_update_module_refuses_another_number_of_updates():
    with pytest.raises(ValueError, match="updates: expected one a parameter, 2, got 3"):
        l2l.update_module(nn.Linear(1, 1), [None] * 3)


def test_what_is_no_module_is_left_alone():
    assert l2l.clone_module(None) is None
    assert l2l.detach_module("anything") is None


def test_small_utilities():
    scores, labels = torch.eye(4)[:, :3], torch.tensor([0, 1, 2, 2])
    assert l2l.utils.accuracy(scores, labels).item() == 0.75
    leaf = torch.ones(2, requires_grad=True)
    copies = [*l2l.clone_parameters([leaf]), *l2l.clone_named_parameters({"a": leaf}).values()]
    assert all(c is not leaf and c.grad_fn is not None for c in copies)


@pytest.mark.parametrize(
    "owner, name, hint",
    [
        (l2l, "vision", "fastmeta.data and fastmeta.models"),
        (l2l, "magic_box", "torch.exp"),
        (l2l.algorithms, "GBML", "fastmeta.rules"),
        (l2l.algorithms, "nothing", "has no attribute 'nothing'$"),
    ],
)
def test_missing_names_say_what_to_use(owner, name, hint):
    with pytest.raises(AttributeError, match=hint):
        getattr(owner, name)
