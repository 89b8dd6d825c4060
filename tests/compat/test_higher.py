"""The stand-in for higher against unrolled loops and torch.optim, and what it refuses."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

import fastmeta.compat.higher as higher
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

Optimizer = Callable[..., torch.optim.Optimizer]

# higher's Adam adds eps before it corrects the bias of the second moment, torch's after.
EPS = 1e-15

OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": lambda params: torch.optim.SGD(params, 0.1),
    "momentum": lambda params: torch.optim.SGD(params, 0.1, 0.9, weight_decay=0.01),
    "dampening": lambda params: torch.optim.SGD(params, 0.1, 0.9, dampening=0.3),
    "nesterov": lambda params: torch.optim.SGD(params, 0.1, 0.9, nesterov=True),
    "maximize": lambda params: torch.optim.SGD(params, 0.1, maximize=True),
    "adam": lambda params: torch.optim.Adam(params, 0.05, (0.8, 0.95), EPS, weight_decay=0.01),
    "amsgrad": lambda params: torch.optim.Adam(params, 0.05, (0.5, 0.5), EPS, amsgrad=True),
    "rmsprop": lambda params: torch.optim.RMSprop(params, 0.02, weight_decay=0.01),
    "centered": lambda params: torch.optim.RMSprop(params, 0.02, momentum=0.5, centered=True),
}


def after_steps(
    net: nn.Module, opt: torch.optim.Optimizer, tasks: Tasks, steps: int, t: int = 0, **options
) -> tuple[nn.Module, Tensor]:
    """The functional network after steps on a task's support, and its query loss."""
    options = {"copy_initial_weights": False} | options
    with higher.innerloop_ctx(net, opt, **options) as (fnet, diffopt):
        for _ in range(steps):
            diffopt.step(F.cross_entropy(fnet(tasks.support_x[t]), tasks.support_y[t]))
        return fnet, F.cross_entropy(fnet(tasks.query_x[t]), tasks.query_y[t])


@pytest.mark.parametrize("name", NETWORKS)
def test_sgd_gives_the_unrolled_gradient(name, device):
    net, tasks = build(name, device), classification(name, device)
    opt = torch.optim.SGD(net.parameters(), lr=9.0)
    lr = torch.tensor(0.1, dtype=torch.float64, device=device, requires_grad=True)
    expected = meta_gradient(net, tasks, F.cross_entropy, lr, 3)
    before = copy.deepcopy(net.state_dict())
    with twice_differentiable():
        losses = [
            after_steps(net, opt, tasks, 3, t, override={"lr": [lr]})[1]
            for t in range(len(tasks.support_x))
        ]
        loss = torch.stack(losses).mean()
        *to_params, to_lr = torch.autograd.grad(loss, [*net.parameters(), lr])
    assert relative_error(loss, expected.loss) < EXACT
    assert relative_error(joined(to_params), joined(expected.params.values())) < EXACT
    assert relative_error(to_lr, expected.lr) < EXACT
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())


@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_of_the_optimizer(name, started, track, device):
    net, tasks = build("mlp", device), classification("mlp", device)
    opt = OPTIMIZERS[name](net.parameters())

    def ordinary_step() -> None:
        opt.zero_grad()
        F.cross_entropy(net(tasks.support_x[0]), tasks.support_y[0]).backward()
        opt.step()

    for _ in range(2 if started else 0):
        ordinary_step()
    fnet, _ = after_steps(net, opt, tasks, 4, track_higher_grads=track)
    for _ in range(4):
        ordinary_step()
    assert relative_error(joined(fnet.parameters()), joined(net.parameters())) < 1e-8


def smooth(opt: torch.optim.Optimizer) -> dict[str, list[float]]:
    """An override without which steps of tiny gradients are too crooked for finite differences."""
    return {"eps": [0.01]} if "eps" in opt.defaults else {}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_are_the_slopes_of_the_query_loss(name, device):
    net, tasks = build("mlp", device), classification("mlp", device)

    def query_loss(net: nn.Module) -> Tensor:
        opt = OPTIMIZERS[name](net.parameters())
        return after_steps(net, opt, tasks, 3, override=smooth(opt))[1]

    grads = torch.autograd.grad(query_loss(net), list(net.parameters()))
    generator = torch.Generator().manual_seed(3)
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype).to(device) for p in grads]

    def loss_at(distance: float) -> Tensor:
        moved = copy.deepcopy(net)
        with torch.no_grad():
            for p, d in zip(moved.parameters(), direction, strict=True):
                p += distance * d
        return query_loss(moved).detach()

    slope = (loss_at(1e-5) - loss_at(-1e-5)) / 2e-5
    expected = sum((g * d).sum() for g, d in zip(grads, direction, strict=True))
    assert relative_error(slope, expected) < 1e-6


@pytest.mark.parametrize("kind", ["sgd", "adam", "rmsprop"])
def test_learned_settings_get_their_slopes(kind, device):
    net, tasks = build("mlp", device), classification("mlp", device)
    opt = {"sgd": OPTIMIZERS["nesterov"], **OPTIMIZERS}[kind](net.parameters())
    override = higher.optim.get_trainable_opt_params(opt, device)
    like = {"dtype": torch.float64, "device": device}
    names = {
        "sgd": {"lr", "momentum", "dampening", "weight_decay"},
        "adam": {"lr", "betas", "eps", "weight_decay"},
        "rmsprop": {"lr", "alpha", "eps", "weight_decay", "momentum"},
    }
    assert set(override) == names[kind]

    def loss_with(**values) -> Tensor:
        return after_steps(net, opt, tasks, 3, override=values)[1]

    override |= smooth(opt)
    override.pop("dampening", None)  # Nesterov's step has none
    doubled = tree_map(lambda v: torch.as_tensor(v).detach().to(**like).requires_grad_(), override)
    leaves, tree = tree_flatten(doubled)
    grads = torch.autograd.grad(loss_with(**doubled), leaves)
    for i, grad in enumerate(grads):
        losses = []
        for distance in (1e-6, -1e-6):
            moved = [leaf.detach() + distance * (i == k) for k, leaf in enumerate(leaves)]
            losses.append(loss_with(**tree_unflatten(moved, tree)).detach())
        assert relative_error((losses[0] - losses[1]) / 2e-6, grad) < 1e-5


def test_learned_settings_go_back_into_the_optimizer():
    opt = torch.optim.Adam([{"params": [nn.Parameter(torch.ones(1))], "lr": lr} for lr in (1, 2)])
    override = higher.optim.get_trainable_opt_params(opt)
    with torch.no_grad():
        override["lr"][1] += 5
        override["betas"][0][1].fill_(0.5)
    higher.optim.apply_trainable_opt_params(opt, override)
    assert [group["lr"] for group in opt.param_groups] == [1.0, 7.0]
    assert opt.param_groups[0]["betas"] == (pytest.approx(0.9), 0.5)
    higher.optim.apply_trainable_opt_params(opt, {"lr": [torch.tensor(3.0)]})
    assert [group["lr"] for group in opt.param_groups] == [3.0, 3.0]
    with pytest.raises(ValueError, match=r"one value of 'lr', or one for each of 2 .* got 3"):
        higher.optim.apply_trainable_opt_params(opt, {"lr": [1, 2, 3]})


def test_parameter_groups_have_settings_of_their_own(device):
    net, tasks = build("mlp", device), classification("mlp", device)
    groups = [{"params": net[4].parameters(), "lr": 0.3}, {"params": net[0].parameters()}]
    opt = torch.optim.SGD(groups, lr=0.1)
    fnet, _ = after_steps(net, opt, tasks, 1)
    loss = F.cross_entropy(net(tasks.support_x[0]), tasks.support_y[0])
    rates = [0.1, 0.1, 0.0, 0.0, 0.3, 0.3]  # net[2] is in no group
    params = list(net.parameters())
    for p, q, g, lr in zip(
        params, fnet.parameters(), torch.autograd.grad(loss, params), rates, strict=True
    ):
        assert relative_error(q, p - lr * g) < EXACT


def test_parameters_of_every_step_are_kept(device):
    net, tasks = build("mlp", device), classification("mlp", device)
    fnet, _ = after_steps(net, OPTIMIZERS["sgd"](net.parameters()), tasks, 2)
    steps = [joined(fnet.parameters(time=k)) for k in range(3)]
    assert torch.equal(steps[0], joined(net.parameters()))
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(steps))
    assert torch.equal(joined(fnet.fast_params), steps[2])
    assert torch.equal(joined(fnet.init_fast_params), steps[0])
    assert torch.equal(joined(fnet.parameters(time=-2)), steps[1])
    with pytest.raises(ValueError, match="time: expected at most 2 updates, got 3"):
        fnet.parameters(time=3)
    with pytest.raises(ValueError, match="recurse"):
        fnet.parameters(recurse=False)


def test_without_tracking_every_step_starts_from_leaves(device):
    net, tasks = build("mlp", device), classification("mlp", device)
    opt = OPTIMIZERS["adam"](net.parameters())
    fnet, loss = after_steps(net, opt, tasks, 3, track_higher_grads=False)
    assert all(p.is_leaf and p.requires_grad for p in fnet.parameters())
    loss.backward()
    assert all(p.grad is None for p in net.parameters())
    for read in (lambda: fnet.parameters(time=1), lambda: fnet.init_fast_params):
        with pytest.raises(ValueError, match="track_higher_grads=False keeps the last"):
            read()


def test_copied_initial_weights_are_cut_off(device):
    net, tasks = build("mlp", device), classification("mlp", device)
    opt = OPTIMIZERS["sgd"](net.parameters())
    fnet, loss = after_steps(net, opt, tasks, 2, copy_initial_weights=True)
    loss.backward()
    assert all(p.grad is None for p in net.parameters())
    assert all(p.grad is not None for p in fnet.parameters(time=0))


def test_given_parameters_become_the_last(device):
    net = build("mlp", device)
    x = torch.ones(2, 3, dtype=torch.float64, device=device)
    fnet = higher.monkeypatch(net)
    zeros = [torch.zeros_like(p) for p in net.parameters()]
    assert torch.equal(fnet(x, params=zeros), torch.zeros_like(net(x)))
    assert torch.equal(fnet(x), torch.zeros_like(net(x)))
    fnet.fast_params = list(net.parameters())
    assert torch.equal(fnet(x), net(x))
    with pytest.raises(ValueError, match="params: expected 6 tensors, got 5"):
        fnet(x, params=zeros[1:])


def test_one_tensor_can_stand_for_two_parameters_and_part_again():
    fnet = higher.monkeypatch(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)))
    one = torch.ones(1, 1)
    fnet.update_params([one, one[0], one, one[0]])
    fnet.update_params([one, one[0], 5 * one, 7 * one[0]])
    assert fnet(one).item() == 17


def test_the_copy_is_of_the_networks_class_and_has_its_submodules(device):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embed(x))

        def embed(self, x: Tensor) -> Tensor:
            return self.features(x).relu()

    net = Net().to(device)
    x = torch.ones(1, 3, device=device)
    fnet = higher.monkeypatch(net, copy_initial_weights=False)
    assert isinstance(fnet, Net)
    assert type(fnet).__name__ == "FunctionalNet"
    fnet.update_params([p + 1 for p in fnet.parameters()])
    assert torch.equal(fnet.features.weight, net.features.weight + 1)
    assert torch.equal(fnet.head(fnet.embed(x)), fnet(x))
    assert not torch.equal(fnet(x), net(x))
    fnet.eval()
    assert net.training


def test_buffers_are_the_copys_own(device):
    net, tasks = build("conv4", device), classification("conv4", device)
    before = copy.deepcopy(net.state_dict())
    fnet, _ = after_steps(net, OPTIMIZERS["sgd"](net.parameters()), tasks, 1)
    assert fnet[1].num_batches_tracked == 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_tied_parameters_are_one(device):
    net = Shared().double().to(device)
    fnet = higher.monkeypatch(net, copy_initial_weights=False)
    assert len(fnet.fast_params) == 2
    fnet.update_params([p + 1 for p in fnet.parameters()])
    assert fnet.third.weight is fnet.first.weight
    assert fnet.again is fnet.first


@pytest.mark.parametrize("track", [True, False])
def test_frozen_and_unused_parameters_stay_as_they_are(track, device):
    tasks = classification("mlp", device)
    net = half_frozen(device)
    fnet, _ = after_steps(
        net, OPTIMIZERS["momentum"](net.parameters()), tasks, 2, track_higher_grads=track
    )
    frozen, *others = fnet.parameters()
    assert torch.equal(frozen, net[0].weight)
    assert not frozen.requires_grad
    assert all(p.requires_grad for p in others)
    heads = TwoHeads().double().to(device)
    fheads, _ = after_steps(heads, OPTIMIZERS["momentum"](heads.parameters()), tasks, 2)
    assert torch.equal(fheads.unused.weight, heads.unused.weight)
    assert not torch.equal(fheads.used.weight, heads.used.weight)


def test_callbacks_see_gradients_in_the_order_of_parameters(device):
    net, tasks = half_frozen(device), classification("mlp", device)
    opt = torch.optim.SGD(list(net.parameters())[::-1], lr=1.0)
    fnet = higher.monkeypatch(net)
    seen = []

    def ones(grads):
        seen.append([g is None for g in grads])
        return [None if g is None else torch.ones_like(g) for g in grads]

    def loss() -> Tensor:
        return F.cross_entropy(fnet(tasks.support_x[0]), tasks.support_y[0])

    diffopt = higher.get_diff_optim(opt, net.parameters(), fnet, grad_callback=ones)
    diffopt.step(loss())
    diffopt.step(loss(), grad_callback=lambda grads: [None] * len(grads))
    assert seen == [[True] + [False] * 5]
    assert torch.equal(fnet[2].weight, net[2].weight - 1)
    assert torch.equal(fnet[0].weight, net[0].weight)
    with pytest.raises(ValueError, match="grad_callback: expected 6 returned gradients, got 2"):
        diffopt.step(loss(), grad_callback=lambda grads: grads[:2])


def test_an_optimizer_without_a_network_is_given_parameters():
    weight = torch.ones(2, requires_grad=True)
    opt = torch.optim.SGD([weight], lr=0.5)
    diffopt = higher.get_diff_optim(opt, [weight])
    (new,) = diffopt.step(weight.square().sum(), params=[weight])
    new.sum().backward()
    assert new.tolist() == [0.0, 0.0]
    assert weight.grad.tolist() == [0.0, 0.0]  # 1 - 2 lr
    with pytest.raises(ValueError, match="params: expected the parameters"):
        diffopt.step(weight.sum())


def test_an_optimizer_of_ones_own():
    class SignDescent(higher.DifferentiableOptimizer):
        def updated(self, p, grad, group, state):
            return p - group["lr"] * grad.sign()

    weight = torch.tensor([3.0, -2.0], requires_grad=True)
    diffopt = SignDescent(torch.optim.SGD([weight], lr=0.5), [weight])
    assert diffopt.step(weight.square().sum(), [weight])[0].tolist() == [2.5, -1.5]
    plain = higher.DifferentiableOptimizer(torch.optim.SGD([weight], lr=0.5), [weight])
    with pytest.raises(NotImplementedError, match="DifferentiableOptimizer has no update"):
        plain.step(weight.sum(), [weight])


@pytest.mark.parametrize("name", ["adam", "amsgrad", "rmsprop", "centered"])
def test_gradients_of_zero_have_finite_derivatives(name):
    weight = torch.zeros(3, requires_grad=True, dtype=torch.float64)
    diffopt = higher.get_diff_optim(OPTIMIZERS[name]([weight]), [weight])
    params = [weight]
    for _ in range(2):
        params = diffopt.step(params[0].pow(3).sum(), params)
    (grad,) = torch.autograd.grad(params[0].sum(), weight)
    assert grad.isfinite().all()
    assert params[0].isfinite().all()


def test_overrides_last_and_can_change_at_a_step():
    weight = torch.zeros(1, requires_grad=True)
    diffopt = higher.get_diff_optim(
        torch.optim.SGD([weight], 1.0), [weight], override={"lr": [2.0]}
    )
    moves = []
    for override in (None, {"lr": [3.0]}, None):
        moves.append(-diffopt.step(weight.sum(), [weight], override=override)[0].item())
    assert moves == [2.0, 3.0, 3.0]


def linear_and(opt: Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
    net = nn.Linear(1, 1)
    return net, opt(net.parameters())


@pytest.mark.parametrize(
    "opt, options, message",
    [
        (torch.optim.AdamW, {}, "expected no decoupled_weight_decay|got AdamW"),
        (torch.optim.Adagrad, {}, "expected one of SGD, Adam, RMSprop of torch.optim, got Adagrad"),
        (torch.optim.SGD, {"override": {"rate": [1.0]}}, r"one of the settings .*, got 'rate'"),
        (torch.optim.SGD, {"override": {"lr": [1.0, 2.0]}}, "one for each of 1 .* got 2"),
    ],
)
def test_what_cannot_be_done_is_refused(opt, options, message):
    with (
        pytest.raises(ValueError, match=message),
        higher.innerloop_ctx(*linear_and(opt), **options),
    ):
        pass


def test_parameters_of_another_network_are_refused():
    with pytest.raises(ValueError, match="2 of the optimizer's parameters are not among them"):
        higher.get_diff_optim(linear_and(torch.optim.SGD)[1], nn.Linear(1, 1).parameters())


def test_a_loss_without_gradients_is_refused():
    net, opt = linear_and(torch.optim.SGD)
    with (
        higher.innerloop_ctx(net, opt) as (fnet, diffopt),
        torch.no_grad(),
        pytest.raises(ValueError, match=r"loss: expected one .* with gradients enabled"),
    ):
        diffopt.step(fnet(torch.ones(1, 1)).sum())


def test_functional_networks_are_not_patched_again():
    with pytest.raises(ValueError, match="module: expected one that is not functional"):
        higher.monkeypatch(higher.monkeypatch(nn.Linear(1, 1)))


def test_tracking_is_a_switch():
    fnet = higher.monkeypatch(nn.Linear(1, 1))
    fnet.track_higher_grads = False
    assert not fnet.track_higher_grads
    with pytest.raises(ValueError, match="track_higher_grads: expected a bool, got 1"):
        fnet.track_higher_grads = 1


def test_missing_names_say_what_to_use():
    with pytest.raises(AttributeError, match=r"register_optim.*DifferentiableOptimizer"):
        higher.register_optim  # noqa: B018
