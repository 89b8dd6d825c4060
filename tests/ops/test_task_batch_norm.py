"""Batch norm of each task: against torch's, edges, errors, and the raw kernels."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch.func import vjp

import fastmeta as fm
from fastmeta.ops import reference
from tests.helpers.assertions import BACKENDS, assert_near
from tests.helpers.case import CaseFactory
from tests.helpers.cases import TASK_BATCH_NORM
from tests.helpers.skips import needs_kernels

each_backend = pytest.mark.parametrize("backend", BACKENDS)


def loop(x, weight=None, bias=None, eps=1e-5):
    """The definition: torch's batch norm, a task at a time."""
    rows = ((None,) * len(x) if row is None else row for row in (weight, bias))
    tasks = zip(x, *rows, strict=True)
    return torch.stack([F.batch_norm(x, None, None, w, b, True, eps=eps) for x, w, b in tasks])


def images(make, *shape):
    """Those whose mean is a hundred times what they deviate from it."""
    return 0.01 * make.randn(*shape) + 1


@each_backend
@pytest.mark.parametrize("case", TASK_BATCH_NORM, ids=str)
def test_it_is_torchs_batch_norm_of_every_task(case, backend, device):
    args, options = case(torch.float64, device)
    batched = tuple(a.unsqueeze(0) for a in args) if args[0].dim() == 4 else args
    with fm.use_backend(backend):
        out = case.function(*args, **options)
    assert_near(out, loop(*batched, **options).view(out.shape), 1e-13)
    assert out.is_contiguous()


@each_backend
def test_a_large_mean_costs_no_digits(backend, device):
    """More numbers than a vector's lanes sum at a time."""
    x = images(CaseFactory(torch.float32, device), 2, 5, 3, 40, 41)
    with fm.use_backend(backend):
        out = fm.task_batch_norm(x, eps=1e-12)
    # What rounding of the mean, half a unit of 1, is to deviations of 0.01.
    assert_near(out, loop(x.double(), eps=1e-12), 100 * torch.finfo(torch.float32).eps)


@needs_kernels
@pytest.mark.parametrize("size", [(31, 33), (2, 2)])
def test_each_kernel_is_the_derivative_of_the_one_before(size, device):
    make = CaseFactory(torch.float64, device)
    x, g, v = (make.randn(2, 4, 3, size[0] * size[1]) for _ in range(3))
    weight, bias, w, b = (make.randn(2, 3) for _ in range(4))
    ops, eps = torch.ops.fastmeta, 0.01
    out, pull = vjp(lambda *p: reference.task_batch_norm(*p, eps), x, weight, bias)
    assert_near(ops.task_batch_norm(x, weight, bias, eps), out, 1e-13)
    for ours, e in zip(ops.task_batch_norm_backward(g, x, weight, eps), pull(g), strict=True):
        assert_near(ours, e, 1e-12)

    def gradient(g, x, weight):
        return vjp(lambda *p: reference.task_batch_norm(*p, bias, eps), x, weight)[1](g)

    second = vjp(gradient, g, x, weight)[1]((v, w))
    expected = second[0] + b[:, None, :, None], *second[1:]
    ours = ops.task_batch_norm_backward_backward(v, w, b, g, x, weight, eps)
    for actual, e in zip(ours, expected, strict=True):
        assert_near(actual, e, 1e-12)


@each_backend
@pytest.mark.parametrize("tasks, examples", [(0, 3), (2, 0), (0, 0)])
def test_without_tasks_or_examples(tasks, examples, backend, device):
    make = CaseFactory(torch.float32, device)
    shapes = (tasks, examples, 2, 5, 4), (tasks, 2), (tasks, 2)
    leaves = [make.randn(*shape).requires_grad_() for shape in shapes]
    with fm.use_backend(backend):
        out = fm.task_batch_norm(*leaves)
        grads = torch.autograd.grad(out.sum(), leaves)
    assert out.shape == shapes[0]
    for leaf, g in zip(leaves, grads, strict=True):
        assert g.shape == leaf.shape and (g == 0).all()


@each_backend
def test_a_number_that_is_not_finite_stays_in_its_channel(backend, device):
    x = CaseFactory(torch.float32, device).randn(2, 3, 4, 5, 5)
    x[1, 2, 3, 4, 4] = torch.inf
    with fm.use_backend(backend):
        out = fm.task_batch_norm(x)
    assert out[1, :, 3].isnan().any() and out.isfinite().sum() == out.numel() - out[1, :, 3].numel()


@needs_kernels
@pytest.mark.parametrize("suffix", ["", "_backward", "_backward_backward"])
def test_opcheck(suffix, device):
    make = CaseFactory(torch.float32, device)
    x, row = make.randn(2, 3, 6, 20), make.randn(2, 6)
    args = {
        "": (x, row, row),
        "_backward": (x.cos(), x, row),
        "_backward_backward": (x.sin(), row, row.cos(), x.cos(), x, row),
    }[suffix]
    op = getattr(torch.ops.fastmeta, f"task_batch_norm{suffix}").default
    assert set(torch.library.opcheck(op, (*args, 1e-5)).values()) == {"SUCCESS"}


@needs_kernels
def test_raw_kernels_check_what_memory_safety_needs(device):
    make, ops = CaseFactory(torch.float32, device), torch.ops.fastmeta
    x, row = make.randn(2, 3, 6, 20), make.randn(2, 6)
    for call in (
        lambda: ops.task_batch_norm(x[0], row, row, 1e-5),
        lambda: ops.task_batch_norm(x, row[:, :5], row, 1e-5),
        lambda: ops.task_batch_norm(x, row, row[:1], 1e-5),
        lambda: ops.task_batch_norm(x, row, row.double(), 1e-5),
        lambda: ops.task_batch_norm(x.long(), row.long(), row.long(), 1e-5),
        lambda: ops.task_batch_norm_backward(x[:, :2], x, row, 1e-5),
        lambda: ops.task_batch_norm_backward(x, x, row[:1], 1e-5),
        lambda: ops.task_batch_norm_backward_backward(x, row, row[:1], x, x, row, 1e-5),
        lambda: ops.task_batch_norm_backward_backward(x[:1], row, row, x, x, row, 1e-5),
    ):
        with pytest.raises((RuntimeError, TypeError)):
            call()


ERRORS = {
    "x number": (
        lambda x, w: fm.task_batch_norm(1.0),
        TypeError,
        "x: expected a tensor, got float",
    ),
    "x int": (
        lambda x, w: fm.task_batch_norm(x.long()),
        TypeError,
        "x: expected a floating-point tensor, got torch.int64",
    ),
    "x dims": (
        lambda x, w: fm.task_batch_norm(x[0, 0]),
        ValueError,
        "x: expected shape [T, B, C, H, W], got [4, 6, 5]",
    ),
    "weight": (
        lambda x, w: fm.task_batch_norm(x, w[:, :3]),
        ValueError,
        "weight: expected shape [2, 4], got [2, 3]",
    ),
    "bias": (
        lambda x, w: fm.task_batch_norm(x, w, w[:1]),
        ValueError,
        "bias: expected shape [2, 4], got [1, 4]",
    ),
    "unbatched": (
        lambda x, w: fm.task_batch_norm(x[0], w),
        ValueError,
        "weight: expected shape [4], got [2, 4]",
    ),
    "dtype": (
        lambda x, w: fm.task_batch_norm(x, w.double()),
        TypeError,
        "weight: expected dtype torch.float32 like x, got torch.float64",
    ),
    "one number": (
        lambda x, w: fm.task_batch_norm(x[:, :1, :, :1, :1]),
        ValueError,
        "x: expected more than one number in each channel, got [2, 1, 4, 1, 1]",
    ),
    "eps": (
        lambda x, w: fm.task_batch_norm(x, eps=0.0),
        ValueError,
        "eps: expected more than 0, got 0.0",
    ),
}


@each_backend
@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument(name, backend, device):
    call, kind, message = ERRORS[name]
    make = CaseFactory(torch.float32, device)
    with fm.use_backend(backend), pytest.raises(kind, match=re.escape(message)):
        call(make.randn(2, 3, 4, 6, 5), make.randn(2, 4))
