"""Weights of examples: means, padding, gradients to the weights."""

from __future__ import annotations

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


@each_engine
@pytest.mark.parametrize("name", NETWORKS)
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


@each_engine
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("steps", "first_order"), [(1, False), (3, False), (2, True)])
def test_gradients_equal_an_unrolled_loop(steps, first_order, normalize, engine, device):
    net, tasks = regressor(device), regression(device)
    torch.manual_seed(0)
    weights = [torch.rand(3, 6, dtype=torch.float64).to(device) for _ in range(2)]
    sources = [*net.parameters(), *(w.requires_grad_() for w in weights)]
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
