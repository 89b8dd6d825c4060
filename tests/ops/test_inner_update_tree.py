"""`inner_update` of trees of parameters: by PyTorch's kernels, and by the op's own."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from torch import Tensor

import fastmeta as fm

STEP_SIZES = {
    "number": lambda dtype: 0.1,
    "scalar": lambda dtype: torch.tensor(0.1, dtype=dtype),
    "row": lambda dtype: torch.tensor([[0.1], [0.2]], dtype=dtype),
    "element": lambda dtype: torch.linspace(0.1, 0.6, 6, dtype=dtype).view(2, 3),
}
each_step_size = pytest.mark.parametrize("lr", STEP_SIZES.values(), ids=STEP_SIZES)


@pytest.fixture(params=[0, 1 << 30], ids=["fused", "plain"], autouse=True)
def kernels(request, monkeypatch):
    """From which size on learned step sizes take the op of their own."""
    monkeypatch.setattr(import_module("fastmeta.ops.inner_update"), "FUSED_FROM", request.param)


def matrices(dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    make = torch.Generator().manual_seed(0)
    pair = torch.randn(2, 2, 3, generator=make, dtype=torch.float64).to(device, dtype)
    return pair[0], pair[1]


def step(params: Tensor, grads: Tensor, lr: Tensor | float) -> Tensor:
    return fm.inner_update({"w": params}, {"w": grads}, lr)["w"]


@each_step_size
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values_are_those_of_the_formula_in_float64(lr, dtype, device):
    params, grads = matrices(dtype, device)
    rate = lr(torch.float32 if dtype.itemsize < 4 else dtype)
    rate = rate.to(device) if isinstance(rate, Tensor) else rate
    exact = params.double() - torch.as_tensor(rate, dtype=torch.float64) * grads.double()
    out = step(params, grads, rate)
    assert out.dtype == dtype
    tiny = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), exact, rtol=2 * tiny, atol=tiny / 4)


@each_step_size
def test_first_and_second_derivatives(lr, device):
    params, grads = matrices(torch.float64, device)
    rate = lr(torch.float64)
    learned = [rate.to(device)] if isinstance(rate, Tensor) else []

    def function(params, grads, *learned):
        return step(params, grads, *(learned or [rate])) ** 2

    inputs = [x.clone().requires_grad_() for x in (params, grads, *learned)]
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs)


@each_step_size
def test_transforms(lr, device):
    params, grads = matrices(torch.float64, device)
    rate = lr(torch.float64)
    rate = rate.to(device) if isinstance(rate, Tensor) else torch.tensor(rate).double().to(device)

    def loss(update, params, grads, rate):
        return update(params, grads, rate).square().sum()

    def plain(params, grads, rate):
        return params - rate * grads

    both = torch.stack([params, 2 * params]), torch.stack([grads, -grads])
    per_task = torch.func.vmap(torch.func.grad(loss, argnums=(1, 2, 3)), in_dims=(None, 0, 0, None))
    for ours, theirs in zip(per_task(step, *both, rate), per_task(plain, *both, rate), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_one_graph(device):
    params, grads = matrices(torch.float32, device)
    learned = torch.tensor(0.1, device=device, requires_grad=True)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for rate in (0.1, learned):
        torch.testing.assert_close(compiled(params, grads, rate), step(params, grads, rate))
    compiled(params, grads, learned).sum().backward()
    torch.testing.assert_close(learned.grad, -grads.sum())
