"""MAML.meta_gradient against meta_loss and backward, and the way through autograd itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta as fm
from fastmeta.core.parameter_layout import ParameterLayout

K, T = 3, 4


@pytest.fixture
def tasks(device) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((T, 5, 3), (T, 5, 2), (T, 6, 3), (T, 6, 2))
    return tuple(
        torch.randn(s, generator=generator, dtype=torch.float64).to(device) for s in shapes
    )


def learner(device, lr: object = 0.05, **options: object) -> fm.MAML:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(device, torch.float64)
    return fm.MAML(net, lr, K, loss=F.mse_loss, **options)


def assert_same(maml: fm.MAML, tasks: tuple[Tensor, ...], weights: list[float] | None) -> None:
    result = maml.meta_gradient(*tasks, weights)
    loss, outputs = maml.meta_loss(*tasks, weights)
    maml.zero_grad()
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in maml.module.parameters()])
    torch.testing.assert_close(result.loss, loss.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(result.outputs, outputs, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(result.grads, expected, rtol=1e-10, atol=1e-14)
    assert not (result.loss.requires_grad or result.grads.requires_grad)
    if isinstance(maml.lr, Tensor) and maml.lr.requires_grad:
        torch.testing.assert_close(result.lr_grad, maml.lr.grad, rtol=1e-10, atol=1e-14)
    else:
        assert result.lr_grad is None


@pytest.mark.parametrize("engine", ["program", "functional"])
@pytest.mark.parametrize("weights", [None, [0.5, 0.0, 1.0]])
@pytest.mark.parametrize("chunk", [None, 3])
def test_equals_meta_loss_and_backward(engine, weights, chunk, tasks, device):
    assert_same(learner(device, engine=engine, task_chunk=chunk), tasks, weights)


@pytest.mark.parametrize("engine", ["program", "functional"])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("shape", [(), (4,), (26,), (K, 1), (K, 26)])
def test_step_sizes_get_their_gradient(engine, first_order, shape, tasks, device):
    lr = torch.full(shape, 0.05, dtype=torch.float64, device=device)
    maml = learner(device, lr, learn_lr=True, engine=engine, first_order=first_order)
    assert_same(maml, tasks, None)


def test_a_module_without_a_program_is_left_to_the_functional_engine(tasks, device):
    class Sine(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sin()

    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 4), Sine(), nn.Linear(4, 2)).to(device, torch.float64)
    assert_same(fm.MAML(net, 0.05, K, loss=F.mse_loss), tasks, None)


def test_works_without_gradients_enabled_and_with_inputs_that_require_them(tasks, device):
    for engine in ("program", "functional"):
        maml = learner(device, engine=engine)
        expected = maml.meta_gradient(*tasks).grads
        inputs = [t.clone().requires_grad_(i in (0, 2)) for i, t in enumerate(tasks)]
        with torch.no_grad():
            found = maml.meta_gradient(*inputs)
        torch.testing.assert_close(found.grads, expected, rtol=0, atol=0)
        assert inputs[0].grad is None


def test_step_sizes_get_their_gradient_without_gradients_enabled(tasks, device):
    lr = torch.full((K, 1), 0.05, dtype=torch.float64, device=device)
    maml = learner(device, lr, learn_lr=True)
    with torch.no_grad():
        found = maml.meta_gradient(*tasks).lr_grad
    torch.testing.assert_close(found, maml.meta_gradient(*tasks).lr_grad, rtol=0, atol=0)


def test_assign_to_does_what_backward_does(tasks, device):
    lr = torch.tensor(0.05, dtype=torch.float64, device=device)
    maml = learner(device, lr, learn_lr=True)
    maml.meta_loss(*tasks)[0].backward()
    expected = {name: p.grad for name, p in maml.named_parameters()}
    maml.zero_grad()
    maml.meta_gradient(*tasks).assign_to(maml)
    for name, p in maml.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-10, atol=1e-14)
    torch.optim.Adam(maml.parameters()).step()


def test_assigning_to_a_learner_of_another_size_is_refused(tasks, device):
    result = learner(device).meta_gradient(*tasks)
    other = fm.MAML(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"grads: expected shape \[2\], got \["):
        result.assign_to(other)
    assert other.module.weight.grad is None


@pytest.mark.parametrize("engine", ["program", "functional"])
def test_the_graph_of_the_meta_loss_can_be_used_once(engine, tasks, device):
    maml = learner(device, engine=engine)
    weight = maml.module[0].weight
    (grad,) = torch.autograd.grad(maml.meta_loss(*tasks)[0], weight, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        grad.sum().backward()


def test_backward_scales_and_adds_up(tasks, device):
    maml = learner(device, engine="program")
    once = maml.meta_gradient(*tasks).grads
    loss = maml.meta_loss(*tasks)[0]
    (2 * loss).backward(retain_graph=True)
    loss.backward()
    found = ParameterLayout.of(maml.module).flatten(
        {n: p.grad for n, p in maml.module.named_parameters()}
    )
    torch.testing.assert_close(found, 3 * once, rtol=1e-12, atol=0)


def test_frozen_parameters_get_no_gradient(tasks, device):
    maml = learner(device, engine="program")
    maml.module[0].weight.requires_grad_(False)
    result = maml.meta_gradient(*tasks)
    result.assign_to(maml)
    assert result.grads.numel() == 14
    assert maml.module[0].weight.grad is None
