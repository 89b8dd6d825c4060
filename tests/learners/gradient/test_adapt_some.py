"""Inner loops that adapt some parameters, while the outer loop learns the others."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta as fm
from fastmeta.core.parameter_layout import ParameterLayout
from tests.helpers.networks import (
    NETWORKS,
    Tasks,
    build,
    classification,
    half_frozen,
    joined,
    regression,
    regressor,
    relative_error,
)
from tests.helpers.programs import build as build_program
from tests.helpers.programs import tasks_for
from tests.helpers.unrolled import leaves_of, meta_gradient

EXACT = 1e-10
HALVES = {"even": slice(0, None, 2), "odd": slice(1, None, 2), "last": slice(-2, None)}

each_engine = pytest.mark.parametrize("engine", ["functional", "auto"])


def names_of(net: nn.Module, half: str) -> tuple[str, ...]:
    return tuple(name for name, _ in net.named_parameters())[HALVES[half]]


def grads_of(net: nn.Module) -> Tensor:
    trainable = [p for p in net.parameters() if p.requires_grad]
    return joined(torch.zeros_like(p) if p.grad is None else p.grad for p in trainable)


def random(device: str, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    values = torch.rand(shape, generator=generator, dtype=torch.float64)
    return (0.2 + values).to(device).requires_grad_()


@dataclass
class Form:
    """A call that adapts some parameters, with what gets a gradient besides the parameters."""

    lr: Tensor
    step_weights: list[float] | None = None
    start: Tensor | None = None
    weights: tuple[Tensor, ...] = ()
    scale: Tensor | None = None

    @classmethod
    def of(cls, name: str, layout: ParameterLayout, steps: int, device: str) -> Form:
        one = torch.tensor(0.1, dtype=torch.float64, device=device)
        rates = 0.1 * random(device, steps, len(layout.names)).detach()
        step_weights = [0.5 + k for k in range(steps)]
        start, scale = random(device, 3, layout.numel), random(device, 4)
        weights = random(device, 3, 6), random(device, 3, 5)
        forms = {
            "plain": cls(one),
            "rates of each step": cls(rates, step_weights),
            "start": cls(0.1 * random(device, layout.numel).detach(), start=start),
            "weights": cls(one, weights=weights),
            "outer": cls(one, scale=scale),
            "all at once": cls(rates, step_weights, start, weights, scale),
        }
        return forms[name]

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs * self.scale, targets)

    @property
    def outer(self) -> list[Tensor]:
        return [] if self.scale is None else [self.scale]

    @property
    def others(self) -> list[Tensor]:
        """What gets a gradient, in the order of the unrolled loop's."""
        return [*([] if self.start is None else [self.start]), *self.weights, *self.outer]


FORMS = ["plain", "rates of each step", "start", "weights", "outer", "all at once"]


def hold_together(actual: Tensor | None, expected: Tensor | None) -> None:
    if expected is None:  # in first order nothing reaches the support
        assert actual is None or not actual.any()
    else:
        assert relative_error(actual, expected) < EXACT


def equals_an_unrolled_loop(
    net: nn.Module,
    tasks: Tasks,
    adapt: Any,
    name: str,
    steps: int,
    first_order: bool,
    engine: str,
    **options: Any,
) -> None:
    """Gradients to parameters, rates, inputs, starts, weights and outer tensors."""
    device = tasks.support_x.device.type
    layout = fm.MAML(net, adapt=adapt).layout
    form = Form.of(name, layout, steps, device)
    loss = F.cross_entropy if form.scale is None else form.loss
    more: dict[str, Any] = {"step_weights": form.step_weights, "start": form.start}
    rates = form.lr.unsqueeze(1) if form.lr.ndim == 2 else form.lr
    reference = {"adapt": layout.names, "weights": form.weights, "outer": form.outer, **more}
    torch.manual_seed(1)  # of dropout
    expected = meta_gradient(net, tasks, loss, rates, steps, first_order, **reference)
    learned = {"learn_lr": True, "loss": loss, "outer": form.outer, **options}
    maml = fm.MAML(net, form.lr, steps, first_order, adapt=adapt, engine=engine, **learned)
    if form.weights:
        more |= dict(zip(("support_weight", "query_weight"), form.weights, strict=True))
    support_x, query_x = leaves_of(tasks)
    data = support_x, tasks.support_y, query_x, tasks.query_y
    torch.manual_seed(1)
    value, outputs = maml.meta_loss(*data, **more)
    value.backward()
    assert relative_error(value, expected.loss) < EXACT
    assert relative_error(outputs, expected.logits) < EXACT
    wanted = joined(expected.params.values())
    assert relative_error(grads_of(net), wanted) < EXACT
    assert relative_error(maml.lr.grad, expected.lr.view_as(maml.lr)) < EXACT
    inputs = zip((support_x, query_x), (expected.support_x, expected.query_x), strict=True)
    others = zip(form.others, expected.others, strict=True)
    for leaf, grad in (*((x.grad, g) for x, g in inputs), *((x.grad, g) for x, g in others)):
        hold_together(leaf, grad)
    net.zero_grad()
    torch.manual_seed(1)
    result = maml.meta_gradient(*tasks, **more)
    assert set(result.shared_grads) == set(expected.params) - set(layout.names)
    result.assign_to(maml)
    assert relative_error(grads_of(net), wanted) < EXACT
    if form.start is not None:
        assert relative_error(result.start_grads, expected.others[0]) < EXACT


@each_engine
@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize(("steps", "first_order"), [(1, False), (3, False), (2, True)])
@pytest.mark.parametrize("name", NETWORKS)
def test_equals_an_unrolled_loop(name, steps, first_order, half, engine, device):
    net, tasks = build(name, device), classification(name, device)
    adapt = names_of(net, half)
    equals_an_unrolled_loop(net, tasks, adapt, "plain", steps, first_order, engine)


@pytest.mark.rotating
@each_engine
@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_call_equals_an_unrolled_loop(form, steps, first_order, half, engine, device):
    """With a frozen parameter too."""
    net, tasks = half_frozen(device), classification("mlp", device)
    adapt = tuple(name for name in names_of(net, half) if name != "0.weight")
    equals_an_unrolled_loop(net, tasks, adapt, form, steps, first_order, engine)


@pytest.mark.rotating
@each_engine
@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize(
    ("form", "steps", "first_order"), [(f, 4 + i % 2, i == 2) for i, f in enumerate(FORMS)]
)
@pytest.mark.parametrize("name", ["conv4", "residual"])
def test_batch_norms_in_every_form_of_call(name, form, steps, first_order, half, engine, device):
    net, tasks = build(name, device), classification(name, device)
    adapt = names_of(net, half)
    equals_an_unrolled_loop(net, tasks, adapt, form, steps, first_order, engine)


@pytest.mark.parametrize("adapt", [("0.weight", "0.bias"), ("3.weight", "3.bias"), ("0.bias",)])
@pytest.mark.parametrize(("steps", "first_order"), [(1, False), (5, False), (4, True)])
@pytest.mark.parametrize("form", ["plain", "start", "weights", "outer"])
def test_dropout_has_the_masks_of_an_unrolled_loop(form, steps, first_order, adapt, device):
    torch.manual_seed(0)
    layers = [nn.Linear(3, 8), nn.Dropout(0.4), nn.Tanh(), nn.Linear(8, 4)]
    net, tasks = nn.Sequential(*layers).double().to(device), classification("mlp", device)
    order = steps, first_order, "functional"
    equals_an_unrolled_loop(net, tasks, adapt, form, *order, task_chunk=1)


@each_engine
@pytest.mark.parametrize("adapt", ["twice.*", ["first.*", "second.*"], "*bias"])
@pytest.mark.parametrize(("form", "steps"), [("plain", 5), ("rates of each step", 3), ("start", 4)])
def test_tied_weights_are_of_one_kind(form, steps, adapt, engine, device):
    net, tasks = build_program("tied", device), tasks_for("tied", "cross_entropy", device)
    equals_an_unrolled_loop(net, tasks, adapt, form, steps, False, engine)
    with pytest.raises(ValueError, match=r"adapt: 'first.weight' is selected and 'second.weight'"):
        fm.MAML(net, adapt="first.*")


@each_engine
@pytest.mark.parametrize("options", [{"task_chunk": 2}, {"memory": "recompute"}, {"task_chunk": 1}])
def test_options_change_nothing(options, engine, device):
    net, tasks = build("mlp", device), classification("mlp", device)
    adapt = names_of(net, "last")
    lr = torch.tensor(0.1, dtype=torch.float64, device=device)
    expected = meta_gradient(net, tasks, F.cross_entropy, lr, 3, adapt=adapt)
    maml = fm.MAML(net, 0.1, 3, adapt=adapt, engine=engine, **options)
    maml.meta_loss(*tasks)[0].backward()
    assert relative_error(grads_of(net), joined(expected.params.values())) < EXACT


@each_engine
def test_calls_that_are_repeated(engine, device):
    """The third call takes the fast path."""
    net, tasks = build("mlp", device), classification("mlp", device)
    maml = fm.MAML(net, 0.1, 2, adapt="4.*", engine=engine)
    results = [maml.meta_gradient(*tasks) for _ in range(4)]
    for result in results[1:]:
        assert torch.equal(result.grads, results[0].grads)
        for name, grad in results[0].shared_grads.items():
            assert torch.equal(result.shared_grads[name], grad)


@each_engine
@pytest.mark.parametrize("rule", [lambda: fm.rules.SGD(momentum=0.9), fm.rules.Adam])
def test_with_a_rule(rule, engine, device):
    """Against the functional engine in the form with a step size of zero for the others."""
    net, tasks = build("mlp", device), classification("mlp", device)
    sizes = [
        torch.full((p.numel(),), 0.1 * (n in ("2.bias", "4.weight")), dtype=torch.float64)
        for n, p in net.named_parameters()
    ]
    everything = fm.MAML(net, torch.cat(sizes).to(device), 2, rule=rule(), engine="functional")
    everything.meta_loss(*tasks)[0].backward()
    expected = grads_of(net)
    net.zero_grad()
    maml = fm.MAML(net, 0.1, 2, rule=rule(), adapt=["2.bias", "4.weight"], engine=engine)
    maml.meta_loss(*tasks)[0].backward()
    assert relative_error(grads_of(net), expected) < EXACT


@each_engine
def test_adapted_tasks_reach_the_shared_parameters(engine, device):
    net, tasks = build("mlp", device), classification("mlp", device)
    maml = fm.MAML(net, 0.1, 2, adapt="4.*", engine=engine)
    maml.meta_loss(*tasks)[0].backward()
    expected = grads_of(net)
    net.zero_grad()
    adapted = maml.adapt_tasks(tasks.support_x, tasks.support_y)
    assert adapted.params.shape == (3, maml.layout.numel)
    assert maml.layout.names == ("4.weight", "4.bias")
    outputs = adapted(tasks.query_x)
    F.cross_entropy(outputs.flatten(0, 1), tasks.query_y.flatten()).backward()
    assert relative_error(grads_of(net), expected) < EXACT


@each_engine
def test_products_are_of_the_adapted_parameters(engine, device):
    net, tasks = build("mlp", device), classification("mlp", device)
    layout = fm.MAML(net, adapt="4.*").layout
    every = fm.MAML(net, engine="functional")
    maml = fm.MAML(net, adapt="4.*", engine=engine)
    vector = torch.randn(2, 3, layout.numel, dtype=torch.float64, device=device)
    wide = F.pad(vector, (every.layout.numel - layout.numel, 0))
    params, batch = joined(net.parameters()).detach(), (tasks.support_x, tasks.support_y)
    for product in ("hvp", "ggnvp"):
        expected = getattr(every, product)(params, batch, wide)[..., -layout.numel :]
        actual = getattr(maml, product)(params[-layout.numel :], batch, vector)
        assert relative_error(actual, expected) < EXACT


def test_one_task_at_a_time_adapts_the_same(device):
    net, tasks = build("mlp", device), classification("mlp", device)
    maml = fm.MAML(net, 0.1, adapt=net[4])
    learner = maml.clone()
    learner.adapt(F.cross_entropy(learner(tasks.support_x[0]), tasks.support_y[0]))
    adapted = maml.adapt_tasks(tasks.support_x, tasks.support_y).task(0)
    assert relative_error(learner.module[4].weight, adapted["4.weight"]) < EXACT
    assert torch.equal(learner.module[0].weight, net[0].weight)


@pytest.mark.parametrize("learner", [fm.MetaSGD, fm.MAMLPlusPlus, fm.MetaCurvature])
def test_relatives(learner, device):
    net, tasks = build("mlp", device), classification("mlp", device)
    maml = learner(net, adapt="4.*").eval()  # MAML++ counts its iterations in training
    maml.meta_loss(*tasks)[0].backward()
    assert all(p.grad is not None for p in maml.parameters())
    twin = learner(copy.deepcopy(net), adapt="4.*", engine="functional").eval()
    twin.load_state_dict(maml.state_dict())
    twin.meta_loss(*tasks)[0].backward()
    assert relative_error(grads_of(net), grads_of(twin.module)) < EXACT


def test_a_learner_without_such_a_gradient_says_so(device):
    tasks = regression(device)
    reptile = fm.Reptile(regressor(device), loss=F.mse_loss, adapt="2.*")
    with pytest.raises(ValueError, match="adapt: Reptile has a gradient to adapted parameters o"):
        reptile.meta_loss(*tasks)


def test_it_says_which_parameters_are_shared(device):
    net = build("mlp", device)
    assert (
        "24 adapted parameters in 2 tensors and 59 that the tasks share"
        in fm.MAML(net, adapt=net[4]).explain()
    )


@each_engine
def test_an_inner_loss_of_its_own(engine, device):
    net, tasks = build("mlp", device), classification("mlp", device)

    def inner(outputs: Tensor, targets: Tensor) -> Tensor:
        return 2 * F.cross_entropy(outputs, targets) + outputs.square().mean()

    lr = torch.tensor(0.1, dtype=torch.float64, device=device)
    expected = meta_gradient(net, tasks, F.cross_entropy, lr, 2, inner_loss=inner)
    maml = fm.MAML(net, 0.1, 2, inner_loss=inner, engine=engine)
    loss, _ = maml.meta_loss(*tasks)
    loss.backward()
    assert relative_error(loss, expected.loss) < EXACT
    assert relative_error(grads_of(net), joined(expected.params.values())) < EXACT
    with pytest.raises(TypeError, match="inner_loss: expected a callable or None, got int"):
        fm.MAML(net, inner_loss=3)


def test_a_learned_inner_loss(device):
    net, tasks = regressor(device), regression(device)
    inner = nn.Sequential(nn.Flatten(0), nn.Linear(6, 1, dtype=torch.float64, device=device))

    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = inner

        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return self.layers((outputs - targets).square()).sum()

    maml = fm.MAML(net, 0.01, 2, loss=F.mse_loss, inner_loss=Learned())
    maml.meta_loss(*tasks)[0].backward()
    assert inner[1].weight.grad.abs().max() > 0
