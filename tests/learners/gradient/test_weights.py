"""Weights of examples: means, padding, gradients to the weights."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import fastmeta as fm
from tests.helpers.networks import (
    NETWORKS,
    build,
    classification,
    joined,
    regression,
    regressor,
    relative_error,
)

EXACT = 1e-10
SIZES = (6, 4, 3), (5, 2, 5)  # examples of the three tasks, support and query

each_engine = pytest.mark.parametrize("engine", ["functional", "auto"])


def present(counts: tuple[int, ...], most: int, device: str) -> Tensor:
    rows = torch.tensor(counts, device=device)[:, None]
    return (torch.arange(most, device=device) < rows).double()


def grads_of(net: nn.Module) -> Tensor:
    return joined(p.grad for p in net.parameters())


@pytest.mark.parametrize(
    ("name", "engine"), [*product(NETWORKS, ("functional", "auto")), ("mlp", "program")]
)
def test_a_padded_batch_equals_its_tasks_one_by_one(name, engine, device):
    net, tasks = build(name, device), classification(name, device)
    support, query = (present(n, max(n), device) for n in SIZES)
    maml = fm.MAML(net, 0.1, 2, engine=engine)
    losses, grads = [], []
    for t, (s, q) in enumerate(zip(*SIZES, strict=True)):
        part = [tensor[t : t + 1, : (s, s, q, q)[i]] for i, tensor in enumerate(tasks)]
        result = maml.meta_gradient(*part)
        losses.append(result.loss)
        grads.append(result.grads)
    x, y, query_x, query_y = (tensor.clone() for tensor in tasks)
    # What is absent has any inputs, and a label that no class has.
    x[support == 0], query_x[query == 0] = 7.0, -3.0
    y[support == 0], query_y[query == 0] = -1, -100
    x.requires_grad_()
    loss, _ = maml.meta_loss(x, y, query_x, query_y, support_weight=support, query_weight=query)
    loss.backward()
    assert relative_error(loss, torch.stack(losses).mean()) < EXACT
    assert relative_error(grads_of(net), torch.stack(grads).mean(0)) < EXACT
    assert (x.grad[support == 0] == 0).all()
    assert (x.grad[support == 1] != 0).any()


@each_engine
def test_weights_of_one_are_no_weights(engine, device):
    net, tasks = build("conv4", device), classification("conv4", device)
    maml = fm.MAML(net, 0.1, 2, engine=engine)
    expected = maml.meta_gradient(*tasks)
    ones = torch.ones(3, 6, device=device), torch.ones(3, 5, device=device)  # float32 is cast
    found = maml.meta_gradient(*tasks, support_weight=ones[0], query_weight=ones[1])
    assert relative_error(found.grads, expected.grads) < EXACT
    adapted = maml.adapt_tasks(*tasks[:2], support_weight=ones[0])
    assert relative_error(adapted.params, maml.adapt_tasks(*tasks[:2]).params) < EXACT


def unrolled(net, tasks, weights, lr, steps, normalize, first_order):
    """The meta-loss of weighted tasks, one after the other."""
    support_weight, query_weight = weights

    def mean(params, x, y, w):
        each = F.mse_loss(functional_call(net, params, (x,)), y, reduction="none").mean(1)
        return (w * each).sum() / (w.sum() if normalize else len(w))

    losses = []
    for t in range(len(tasks.support_x)):
        params = dict(net.named_parameters())
        for _ in range(steps):
            loss = mean(params, tasks.support_x[t], tasks.support_y[t], support_weight[t])
            grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            grads = [g.detach() for g in grads] if first_order else grads
            params = {n: p - lr * g for (n, p), g in zip(params.items(), grads, strict=True)}
        losses.append(mean(params, tasks.query_x[t], tasks.query_y[t], query_weight[t]))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("engine", ["functional", "program", "auto"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("steps", "first_order"), [(1, False), (3, False), (2, True)])
def test_gradients_equal_an_unrolled_loop(steps, first_order, normalize, engine, device):
    net, tasks = regressor(device), regression(device)
    torch.manual_seed(0)
    weights = [torch.rand(3, 6, dtype=torch.float64).to(device) for _ in range(2)]
    sources = list(net.parameters())
    if engine != "program":  # which has no gradient to weights
        sources += [w.requires_grad_() for w in weights]
    expected = unrolled(net, tasks, weights, 0.1, steps, normalize, first_order)
    wanted = torch.autograd.grad(expected, sources, allow_unused=first_order)
    maml = fm.MAML(
        net,
        0.1,
        steps,
        first_order,
        F.mse_loss,
        normalize_weights=normalize,
        engine=engine,
    )
    loss, _ = maml.meta_loss(*tasks, support_weight=weights[0], query_weight=weights[1])
    found = torch.autograd.grad(loss, sources, allow_unused=first_order)
    assert relative_error(loss, expected) < EXACT
    for a, e in zip(found, wanted, strict=True):
        # In first order the support's weights reach nothing, as its inputs do not.
        assert (e is None and (a is None or not a.any())) or relative_error(a, e) < EXACT


@each_engine
def test_weights_of_adapted_tasks(engine, device):
    net, tasks = regressor(device), regression(device)
    torch.manual_seed(0)
    weight = torch.rand(3, 6, dtype=torch.float64, device=device).requires_grad_()
    maml = fm.MAML(net, 0.1, 2, loss=F.mse_loss, engine=engine)
    maml.meta_loss(*tasks, support_weight=weight)[0].backward()
    expected, weight.grad = weight.grad, None
    adapted = maml.adapt_tasks(*tasks[:2], support_weight=weight)
    F.mse_loss(adapted(tasks.query_x), tasks.query_y).backward()
    assert relative_error(weight.grad, expected) < EXACT


OPTIONS: dict[str, dict[str, object]] = {
    "three steps": {"steps": 3},
    "no steps": {"steps": 0},
    "first order": {"first_order": True},
    "chunks": {"task_chunk": 2},
    "one by one": {"task_chunk": 1},
    "forward": {"hvp_mode": "forward"},
    "recomputed": {"memory": "recompute"},
    "learned step size": {"learn_lr": True},
    "some parameters": {"adapt": ["0.*", "2.bias"]},
    "momentum": {"rule": lambda: fm.rules.SGD(momentum=0.5)},
    "not normalized": {"normalize_weights": False},
}
LOSSES = {"squared error": (F.mse_loss, regressor), "cross entropy": (F.cross_entropy, None)}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("option", OPTIONS)
def test_both_engines_weigh_alike(option, loss, device):
    fn, make = LOSSES[loss]
    net = build("mlp", device) if make is None else make(device)
    tasks = classification("mlp", device) if make is None else regression(device)
    torch.manual_seed(0)
    sets = tasks.support_x, tasks.query_x
    support, query = (torch.rand(x.shape[:2], dtype=x.dtype).to(device) for x in sets)
    support[0, 1] = query[2] = 0
    options = {"steps": 2, **OPTIONS[option]}

    def results(engine: str) -> list[Tensor]:
        rule = options.get("rule")
        more = {**options, "rule": rule()} if callable(rule) else options
        maml = fm.MAML(net, 0.1, loss=fn, engine=engine, **more)
        x = tasks.support_x.clone().requires_grad_()
        data, weights = (x, *tasks[1:]), {"support_weight": support, "query_weight": query}
        value, outputs = maml.meta_loss(*data, **weights)
        sources = [*maml.parameters(), x]
        found = [value, outputs, *derivatives(value, sources)]
        found += [maml.meta_gradient(*tasks, **weights).grads]
        adapted = maml.adapt_tasks(*data[:2], support_weight=support).params
        found += [adapted, *derivatives(adapted.square().sum(), sources)]
        if maml.steps:
            shares = [0.3] * maml.steps
            found += derivatives(maml.meta_loss(*data, shares, **weights)[0], sources)
        with torch.no_grad():
            found += [maml.adapt_tasks(*tasks[:2], support_weight=support).params]
            found += [maml.meta_loss(*tasks, **weights)[0]]
        return found

    for actual, expected in zip(results("program"), results("functional"), strict=True):
        assert relative_error(actual, expected) < EXACT


def derivatives(value: Tensor, sources: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(value, sources, allow_unused=True, materialize_grads=True))


def test_weights_that_programs_do_not_have(device):
    net, tasks = build("mlp", device), classification("mlp", device)
    weight = torch.ones(3, 6, dtype=torch.float64, device=device, requires_grad=True)
    with pytest.raises(ValueError, match="no task program: weights require gradients"):
        fm.MAML(net, engine="program").meta_loss(*tasks, support_weight=weight)
    net, tasks = build("conv4", device), classification("conv4", device)
    with pytest.raises(ValueError, match="examples have weights, which its batch norm does not"):
        fm.MAML(net, engine="program").meta_loss(*tasks, support_weight=weight.detach())


def test_repeated_calls_take_weights_that_come_and_go(device):
    net, tasks = build("mlp", device), classification("mlp", device)
    torch.manual_seed(0)
    maml, functional = (fm.MAML(net, 0.1, engine=engine) for engine in ("auto", "functional"))
    weight = torch.rand(3, 6, dtype=torch.float64).to(device)
    for given in (None, None, None, weight, None, weight, 2 * weight**2, None):
        found = maml.meta_gradient(*tasks, support_weight=given).grads
        expected = functional.meta_gradient(*tasks, support_weight=given).grads
        assert relative_error(found, expected) < EXACT


def test_weights_of_zero_have_a_gradient(device):
    """Learning to reweight (Ren 2018) starts from weights of zero."""
    net, tasks = regressor(device), regression(device)
    weight = torch.zeros(3, 6, dtype=torch.float64, device=device, requires_grad=True)
    maml = fm.MAML(net, 0.1, loss=F.mse_loss, normalize_weights=False)
    maml.meta_loss(*tasks, support_weight=weight)[0].backward()
    assert (weight.grad != 0).all()


def test_a_task_without_examples_is_not_adapted(device):
    net, tasks = build("mlp", device), classification("mlp", device)
    weight = torch.ones(3, 6, dtype=torch.float64, device=device)
    weight[1] = 0
    adapted = fm.MAML(net, 0.1).adapt_tasks(*tasks[:2], support_weight=weight)
    assert torch.equal(adapted.params[1], joined(net.parameters()))


@pytest.mark.parametrize("learner", [fm.MetaSGD, fm.MAMLPlusPlus, fm.FOMAML])
def test_relatives(learner, device):
    net, tasks = build("mlp", device), classification("mlp", device)
    maml = learner(net).eval()  # MAML++ counts its iterations in training
    expected = maml.meta_gradient(*tasks).loss
    ones = torch.ones(3, 6, dtype=torch.float64, device=device)
    assert relative_error(maml.meta_gradient(*tasks, support_weight=ones).loss, expected) < EXACT
    assert relative_error(maml.meta_loss(*tasks, support_weight=ones)[0], expected) < EXACT


def test_under_torch_compile(device):
    net, tasks = build("mlp", device), classification("mlp", device)
    torch.manual_seed(0)
    weight = torch.rand(3, 6, dtype=torch.float64, device=device).requires_grad_()
    maml = fm.MAML(net, 0.1, 2)
    maml.meta_loss(*tasks, support_weight=weight)[0].backward()
    expected, weight.grad = weight.grad, None
    compiled = torch.compile(lambda w, *data: maml.meta_loss(*data, support_weight=w)[0])
    compiled(weight, *tasks).backward()
    assert torch.equal(weight.grad, expected)


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (torch.ones(3, 5), ValueError, r"support_weight: expected shape \[3, 6\], got \[3, 5\]"),
        (torch.ones(3, 6).long(), TypeError, "support_weight: expected a floating-point tensor"),
        ([1.0], TypeError, "support_weight: expected a floating-point tensor, got list"),
    ],
)
def test_weights_that_do_not_fit(weight, error, message, device):
    net, tasks = build("mlp", device), classification("mlp", device)
    weight = weight.to(device) if torch.is_tensor(weight) else weight
    with pytest.raises(error, match=message):
        fm.MAML(net).meta_loss(*tasks, support_weight=weight)


def test_a_loss_that_is_a_sum_takes_no_weights(device):
    net, tasks = regressor(device), regression(device)
    ones = torch.ones(3, 6, dtype=torch.float64, device=device)
    with pytest.raises(ValueError, match="expected a mean over the examples"):
        fm.MAML(net, loss=nn.MSELoss(reduction="sum")).meta_loss(*tasks, query_weight=ones)
