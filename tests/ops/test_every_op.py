"""Every op on every case of tests/helpers/cases.py: values, derivatives, layouts, repeated bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

import fastmeta as fm
from tests.helpers.assertions import (
    TOLERANCE,
    assert_near,
    each_backend,
    each_case,
    each_small_case,
    value_and_grads,
)
from tests.helpers.case import DTYPES, METRICS, Case, CaseFactory
from tests.helpers.cases import as_function


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_backend
@each_case
def test_value_and_gradient_match_the_float64_reference(case, backend, dtype, device):
    args, options = case(dtype, device)
    exact = [a.double() if torch.is_tensor(a) and a.is_floating_point() else a for a in args]
    with fm.use_backend("torch"):
        expected = value_and_grads(case, tuple(exact), options, dtype)
    with fm.use_backend(backend):
        actual = value_and_grads(case, args, options)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == dtype
        assert_near(a, e, TOLERANCE[dtype])


@pytest.mark.rotating
@each_backend
@each_small_case
def test_derivatives_match_finite_differences(case, backend, device):
    function, inputs = as_function(case, *case(torch.float64, device))
    inputs = tuple(x.requires_grad_() for x in inputs)
    with fm.use_backend(backend):
        assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
        assert gradgradcheck(function, inputs, check_fwd_over_rev=True, check_batched_grad=True)


@each_case
def test_non_contiguous_and_expanded_inputs(case, device):
    args, options = case(torch.float64, device)
    strided = tuple(
        torch.stack([a, a], -1)[..., 0] if torch.is_tensor(a) and a.dim() else a for a in args
    )
    plain = value_and_grads(case, args, options)
    for a, b in zip(value_and_grads(case, strided, options), plain, strict=True):
        assert_same_bits(case, a, b)
    if case.name.endswith("unbatched"):
        return
    expanded = tuple(
        a[:1].expand(a.shape) if torch.is_tensor(a) and a.dim() > 1 else a for a in args
    )
    copied = tuple(a.contiguous() if torch.is_tensor(a) else a for a in expanded)
    function = case.function
    assert_same_bits(case, function(*expanded, **options), function(*copied, **options))


def assert_same_bits(case: Case, a: torch.Tensor, b: torch.Tensor) -> None:
    """But for rounding where the sums are PyTorch's, whose order may go by layout and threads."""
    op = fm.core.backend.PRODUCT if case.op == "task_linear" else case.op
    if fm.core.backend.is_available(op, a):
        assert torch.equal(a, b)
    else:
        assert_near(a, b, TOLERANCE[a.dtype])


@each_case
def test_inputs_are_left_as_they_are(case, device):
    args, options = case(torch.float32, device)
    before = [a.clone() if torch.is_tensor(a) else a for a in args]
    value_and_grads(case, args, options)
    for a, b in zip(args, before, strict=True):
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b


@each_case
def test_bits_repeat_whatever_the_number_of_threads(case, device):
    args, options = case(torch.float32, device)
    first = value_and_grads(case, args, options)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        second = value_and_grads(case, args, options)
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(first, second, strict=True):
        assert_same_bits(case, a, b)


any_shape = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # `device` is a mere name
)


@any_shape
@given(
    metric=st.sampled_from(METRICS),
    sizes=st.tuples(*(st.integers(1, n) for n in (3, 150, 150)), st.integers(2, 70)),
    reduction=st.sampled_from(["mean", "sum", "none"]),
)
def test_losses_and_distances_of_any_shape(device, metric, sizes, reduction):
    t, q, n, d = sizes
    make = CaseFactory(torch.float64, device)
    query, prototypes, labels = make.randn(t, q, d), make.randn(t, n, d), make.labels(n, t, q)
    ways = min(5, n)
    of_rows = torch.arange(n, device=device).remainder(ways).repeat(t, 1)
    for op, args, options in (
        ("pairwise_distance", (query, prototypes), {"metric": metric}),
        ("prototype_loss", (query, labels, prototypes), {"metric": metric, "reduction": reduction}),
        ("matching_loss", (query, labels % ways, prototypes, of_rows), {"reduction": reduction}),
    ):
        case = Case(op, "any shape", lambda make: (), small=False)
        actual = value_and_grads(case, args, options)
        with fm.use_backend("torch"):
            expected = value_and_grads(case, args, options)
        for a, e in zip(actual, expected, strict=True):
            assert_near(a, e, 1e-12)


@any_shape
@given(
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(1, 9), st.integers(1, 600)),
    lr_rows=st.booleans(),
    lr_columns=st.booleans(),
)
def test_prototypes_and_updates_of_any_shape(device, sizes, lr_rows, lr_columns):
    t, s, n, d = sizes
    make = CaseFactory(torch.float64, device)
    lr = make.randn(t if lr_rows else 1, s * d if lr_columns else 1)
    for op, args in (
        ("prototypes", (make.randn(t, s, d), make.labels(n, t, s), n)),
        ("inner_update", (make.randn(t, s * d), make.randn(t, s * d), lr)),
    ):
        case = Case(op, "any shape", lambda make: (), small=False)
        actual = value_and_grads(case, args, {})
        with fm.use_backend("torch"):
            expected = value_and_grads(case, args, {})
        for a, e in zip(actual, expected, strict=True):
            assert_near(a, e, 1e-12)
