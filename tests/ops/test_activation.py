"""Activations: against torch's, far from 0, edges, errors, and the raw kernels."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch.func import vjp

import fastmeta as fm
from fastmeta.ops.activation import KINDS
from tests.helpers.assertions import BACKENDS, assert_near
from tests.helpers.case import CaseFactory
from tests.helpers.skips import needs_kernels

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_kind = pytest.mark.parametrize("kind", KINDS)

TORCHS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "mish": F.mish,
    "silu": F.silu,
    "softplus": F.softplus,
}


def derivatives(function, x: torch.Tensor) -> list[torch.Tensor]:
    """Value, slope, curvature and the third derivative of each element."""
    x = x.requires_grad_()
    found = [function(x)]
    for _ in range(3):
        found += torch.autograd.grad(found[-1].sum(), x, create_graph=True)
    return found


@each_backend
@each_kind
def test_it_and_its_derivatives_are_torchs(kind, backend, device):
    x = 3 * CaseFactory(torch.float64, device).randn(2, 5000)
    with fm.use_backend(backend):
        ours = derivatives(lambda x: fm.activation(x, kind), x)
    for actual, e in zip(ours, derivatives(TORCHS[kind], x), strict=True):
        assert_near(actual, e, 1e-13)
        assert actual.is_contiguous()


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each_kind
def test_far_from_0_it_is_0_or_its_argument(kind, dtype, device):
    """Also where PyTorch's second derivative of mish is not a number."""
    x = torch.tensor([-1e4, -800.0, 800.0, 1e4], dtype=dtype, device=device)
    value, slope, curvature, _ = derivatives(lambda x: fm.activation(x, kind), x)
    assert value.tolist() == [0, 0, 800, 1e4]
    assert slope.tolist() == [0, 0, 1, 1]
    assert curvature.tolist() == [0, 0, 0, 0]


@needs_kernels
def test_softplus_has_its_numbers(device):
    x = 3 * CaseFactory(torch.float64, device).randn(500)
    ours = derivatives(lambda x: fm.activation(x, "softplus", beta=1.5, threshold=2), x)
    for actual, e in zip(ours, derivatives(lambda x: F.softplus(x, 1.5, 2), x), strict=True):
        assert_near(actual, e, 1e-13)


@needs_kernels
@each_kind
def test_each_kernel_is_the_derivative_of_the_one_before(kind, device):
    make = CaseFactory(torch.float64, device)
    x, g, v = (make.randn(3, 701) for _ in range(3))
    ops, code = torch.ops.fastmeta, (int(KINDS[kind]), 1.0, 20.0)
    out, pull = vjp(TORCHS[kind], x)
    assert_near(ops.activation(x, *code), out, 1e-14)
    assert_near(ops.activation_backward(g, x, *code), pull(g)[0], 1e-14)
    second = vjp(lambda g, x: vjp(TORCHS[kind], x)[1](g)[0], g, x)[1](v)
    ours = ops.activation_backward_backward(v, g, x, *code)
    for actual, e in zip(ours, second, strict=True):
        assert_near(actual, e, 1e-13)


@each_backend
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,)])
def test_shapes_at_the_edge(shape, backend, device):
    x = CaseFactory(torch.float64, device).randn(*shape)
    with fm.use_backend(backend):
        found = derivatives(lambda x: fm.activation(x, "mish"), x)
    for actual, e in zip(found, derivatives(F.mish, x), strict=True):
        assert actual.shape == shape
        torch.testing.assert_close(actual, e, rtol=1e-13, atol=1e-13)


@each_backend
def test_what_is_not_a_number_stays_one(backend, device):
    x = CaseFactory(torch.float32, device).randn(2, 20)
    x[1, 3] = torch.nan
    with fm.use_backend(backend):
        for kind in KINDS:
            out = fm.activation(x, kind)
            assert out.isnan().nonzero().tolist() == [[1, 3]]


@needs_kernels
def test_mapped_dimensions_may_stand_anywhere(device):
    x = CaseFactory(torch.float64, device).randn(3, 4, 5)

    def loss(x, y):
        return (fm.activation(x, "mish") * fm.activation(x * y, "silu")).sum()

    def expected(x, y):
        return (F.mish(x) * F.silu(x * y)).sum()

    y = x[0, 0]
    for dim in (0, 1, 2):
        part = x.movedim(dim, 0)
        # y is the same for every sample where its size fits.
        other = y if dim != 2 else torch.tensor(0.7, dtype=x.dtype, device=device)
        hessian = torch.vmap(torch.func.hessian(loss), in_dims=(dim, None))(x, other)
        rows = torch.stack([torch.func.hessian(expected)(row, other) for row in part])
        assert_near(hessian, rows, 1e-12)


@needs_kernels
@pytest.mark.parametrize("count", [1, 2, 3])
def test_opcheck(count, device):
    make = CaseFactory(torch.float32, device)
    op = ("activation", "activation_backward", "activation_backward_backward")[count - 1]
    args = [make.randn(2, 300) for _ in range(count)]
    checks = torch.library.opcheck(getattr(torch.ops.fastmeta, op).default, (*args, 9, 1.0, 20.0))
    assert set(checks.values()) == {"SUCCESS"}


@needs_kernels
def test_raw_kernels_check_what_memory_safety_needs(device):
    x, ops = CaseFactory(torch.float32, device).randn(2, 30), torch.ops.fastmeta
    code = (9, 1.0, 20.0)
    for call in (
        lambda: ops.activation(x, 10, 0.0, 0.0),
        lambda: ops.activation(x, -1, 0.0, 0.0),
        lambda: ops.activation(x.long(), *code),
        lambda: ops.activation(x.half(), *code),
        lambda: ops.activation_backward(x[:1], x, *code),
        lambda: ops.activation_backward(x.double(), x, *code),
        lambda: ops.activation_backward_backward(x[:1], x, x, *code),
        lambda: ops.activation_backward_backward(x, x[:, :3], x, *code),
    ):
        with pytest.raises((RuntimeError, ValueError)):
            call()


ERRORS = {
    "number": (1.0, "mish", TypeError, "x: expected a tensor, got float"),
    "int": (
        torch.arange(3),
        "mish",
        TypeError,
        "x: expected a floating-point tensor, got torch.int64",
    ),
    "kind": (
        torch.ones(3),
        "relu",
        ValueError,
        "kind: expected one of gelu, gelu_tanh, mish, silu, softplus, got 'relu'",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    x, kind, error, message = ERRORS[name]
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        fm.activation(x, kind)
