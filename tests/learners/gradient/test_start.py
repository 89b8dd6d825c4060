"""Inner loops that start from parameters that are given."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastmeta as fm
from tests.helpers.networks import build, classification, joined, relative_error

EXACT = 1e-10

each_engine = pytest.mark.parametrize("engine", ["functional", "auto"])


@each_engine
@pytest.mark.parametrize("adapt", [None, "*bias"])
def test_each_task_from_its_own_parameters(adapt, engine, device):
    """As separate learners whose modules have these parameters."""
    net, tasks = build("mlp", device), classification("mlp", device)
    maml = fm.MAML(net, 0.1, 2, adapt=adapt, engine=engine)
    start = torch.randn(3, maml.layout.numel, dtype=torch.float64, device=device)
    start.requires_grad_()
    loss, _ = maml.meta_loss(*tasks, start=start)
    loss.backward()
    losses, grads = [], []
    for t in range(3):
        twin = build("mlp", device)
        for name, value in maml.layout.views(start.detach()[t]).items():
            twin.get_parameter(name).data.copy_(value)
        one = fm.MAML(twin, 0.1, 2, adapt=adapt, engine=engine)
        result = one.meta_gradient(*(tensor[t : t + 1] for tensor in tasks))
        losses.append(result.loss)
        grads.append(result.grads / 3)
    assert relative_error(loss, torch.stack(losses).mean()) < EXACT
    assert relative_error(start.grad, torch.stack(grads)) < EXACT
    own = dict(net.named_parameters())
    assert all(own[name].grad is None or not own[name].grad.any() for name in maml.layout.names)


@each_engine
def test_a_generator_of_starts_equals_a_learner_for_each_description(engine, device):
    net, tasks = build("mlp", device), classification("mlp", device)
    maml = fm.MAML(net, 0.1, 2, engine=engine)
    generator = nn.Linear(2, maml.layout.numel, bias=False, dtype=torch.float64, device=device)
    kinds = torch.tensor([0, 1, 0], device=device)
    described = F.one_hot(kinds, 2).double()
    maml.meta_loss(*tasks, start=generator(described))[0].backward()
    for kind in range(2):
        of_kind = kinds == kind
        theta = generator.weight.detach()[:, kind]
        part = [tensor[of_kind] for tensor in tasks]
        result = maml.meta_gradient(*part, start=theta)
        expected = result.start_grads * of_kind.sum() / 3
        assert relative_error(generator.weight.grad[:, kind], expected) < EXACT


@each_engine
def test_a_dict_of_some_parameters(engine, device):
    """The others start from the module's own, which get their gradient."""
    net, tasks = build("mlp", device), classification("mlp", device)
    maml = fm.MAML(net, 0.1, 2, engine=engine)
    bias = torch.zeros(3, 4, dtype=torch.float64, device=device, requires_grad=True)
    maml.meta_loss(*tasks, start={"4.bias": bias})[0].backward()
    start = joined(net.parameters()).detach().repeat(3, 1)
    start[:, -4:] = 0
    expected = maml.meta_gradient(*tasks, start=start).start_grads
    assert relative_error(bias.grad, expected[:, -4:]) < EXACT
    own = joined(p.grad for p in list(net.parameters())[:-1])
    assert relative_error(own, expected[:, :-4].sum(0)) < EXACT
    shared = maml.meta_loss(*tasks, start={"4.bias": bias.detach()[0]})[0]
    assert relative_error(shared, maml.meta_gradient(*tasks, start=start[0]).loss) < EXACT


@each_engine
def test_adapting_goes_on_from_adapted_parameters(engine, device):
    net, tasks = build("mlp", device), classification("mlp", device)
    maml = fm.MAML(net, 0.1, 4, engine=engine)
    support = tasks.support_x, tasks.support_y
    half = maml.adapt_tasks(*support, steps=2)
    again = maml.adapt_tasks(*support, steps=2, start=half.params)
    assert relative_error(again.params, maml.adapt_tasks(*support).params) < EXACT


@each_engine
def test_gradients_of_each_task(engine, device):
    net, tasks = build("mlp", device), classification("mlp", device)
    maml = fm.MAML(net, 0.1, 2, engine=engine)
    grads = maml.task_gradients(*tasks)
    for t in range(3):
        single = maml.meta_gradient(*(tensor[t : t + 1] for tensor in tasks)).grads
        assert relative_error(grads[t], single) < EXACT


def test_assigning_leaves_what_the_loss_does_not_depend_on(device):
    net, tasks = build("mlp", device), classification("mlp", device)
    maml = fm.MAML(net, torch.tensor(0.1, dtype=torch.float64, device=device), learn_lr=True)
    result = maml.meta_gradient(*tasks, start=joined(net.parameters()).detach())
    result.assign_to(maml)
    assert all(p.grad is None for p in net.parameters())
    assert maml.lr.grad is not None


@each_engine
def test_under_torch_compile(engine, device):
    net, tasks = build("mlp", device), classification("mlp", device)
    maml = fm.MAML(net, 0.1, 2, adapt="4.*", engine=engine)
    start = joined(net[4].parameters()).detach().requires_grad_()
    maml.meta_loss(*tasks, start=start)[0].backward()
    expected, shared = start.grad.clone(), net[0].weight.grad.clone()
    start.grad = net[0].weight.grad = None
    compiled = torch.compile(lambda *data: maml.meta_loss(*data[:4], start=data[4])[0])
    compiled(*tasks, start).backward()
    assert torch.equal(start.grad, expected)
    assert torch.equal(net[0].weight.grad, shared)


@pytest.mark.parametrize(
    ("start", "error", "message"),
    [
        (torch.zeros(7), ValueError, r"theta: expected shape \[83\] or \[3, 83\], got \[7\]"),
        ({"9.bias": torch.zeros(4)}, ValueError, r"start: expected names of adapted parameters"),
        ({"4.bias": torch.zeros(5)}, ValueError, r"'4.bias' of shape \[4\] or \[T, 4\], got \[5\]"),
        ({"4.bias": 3.0}, TypeError, "expected a tensor for '4.bias', got float"),
        (
            {"4.bias": torch.zeros(3, 4), "0.bias": torch.zeros(2, 6)},
            ValueError,
            r"start: expected one number of tasks, got \[2, 3\]",
        ),
    ],
)
def test_what_does_not_fit(start, error, message, device):
    net, tasks = build("mlp", device), classification("mlp", device)
    if isinstance(start, dict):
        start = {n: t.double().to(device) if torch.is_tensor(t) else t for n, t in start.items()}
    else:
        start = start.double().to(device)
    with pytest.raises(error, match=message):
        fm.MAML(net).meta_loss(*tasks, start=start)
