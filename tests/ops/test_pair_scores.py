"""Scores of all pairs: against concatenation, identities, edges, errors, and the raw kernels."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.func import vjp

import fastmeta as fm
from fastmeta.ops import reference
from tests.helpers.assertions import TOLERANCE, assert_near, each_backend, value_and_grads
from tests.helpers.case import Case, CaseFactory
from tests.helpers.row_cases import PAIR_ACTIVATIONS
from tests.helpers.skips import needs_kernels

each_activation = pytest.mark.parametrize("activation", PAIR_ACTIVATIONS)
OPS = torch.ops.fastmeta


def rows(t=2, q=4, n=3, h=5, dtype=torch.float64, device="cpu"):
    make = CaseFactory(dtype, device)
    return make.randn(t, q, h), make.randn(t, n, h), make.randn(t, h), make.randn(t)


@each_backend
@pytest.mark.parametrize("activation", ["relu", "tanh", "silu"])
def test_it_is_a_network_of_the_concatenation(activation, backend, device):
    """With the first layer split outside, in which a swap of the halves swaps the rows."""
    make = CaseFactory(torch.float64, device)
    a, b, w1, b1 = make.randn(2, 6, 3), make.randn(2, 4, 3), make.randn(7, 6), make.randn(7)
    w, bias = make.randn(7), make.randn()
    pairs = torch.cat([a.unsqueeze(2).expand(2, 6, 4, 3), b.unsqueeze(1).expand(2, 6, 4, 3)], -1)
    expected = getattr(F, activation)(F.linear(pairs, w1, b1)) @ w + bias
    with fm.use_backend(backend):
        x, y = F.linear(a, w1[:, :3], b1), F.linear(b, w1[:, 3:])
        assert_near(fm.pair_scores(x, y, w, bias, activation), expected, 1e-13)
        swapped = fm.pair_scores(y, x, w, bias, activation)
    assert_near(swapped, expected.mT, 1e-13)


@each_backend
def test_relu_of_both_signs_is_the_distance(backend, device):
    a, b, *_ = rows(device=device)
    ones = a.new_ones(10)
    with fm.use_backend(backend):
        of_relu = fm.pair_scores(torch.cat([a, -a], 2), torch.cat([-b, b], 2), ones)
        of_abs = fm.pair_scores(a, b, ones[:5], activation="abs")
    assert_near(of_relu, torch.cdist(a, b, p=1), 1e-13)
    assert_near(of_abs, torch.cdist(a, b, p=1), 1e-13)


@each_backend
@each_activation
def test_weights_of_zero_leave_the_bias(activation, backend, device):
    x, y, weight, bias = rows(device=device)
    with fm.use_backend(backend):
        scores = fm.pair_scores(x, y, 0 * weight, bias, activation)
    assert torch.equal(scores, bias[:, None, None].expand(2, 4, 3))


@each_backend
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_identical_rows_have_no_gradient(dtype, backend, device):
    """The distance of a row to itself has a kink there, which must not become NaN."""
    x, _, weight, _ = rows(dtype=dtype, device=device)
    x = x[:1].expand(2, -1, -1)[:, :1].clone().requires_grad_()
    with fm.use_backend(backend):
        scores = fm.pair_scores(x, x, weight, activation="abs")
        (grad,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
    assert (scores == 0).all() and (grad == 0).all()
    x, y = (z.detach().requires_grad_() for z in (x, x))
    with fm.use_backend(backend):
        grads = torch.autograd.grad(fm.pair_scores(x, y, weight, activation="abs").sum(), (x, y))
    assert (grads[0] == 0).all() and (grads[1] == 0).all()


@each_backend
def test_relu_has_no_slope_at_zero(backend, device):
    x = torch.tensor([[1.0, 0.0]], device=device, requires_grad=True)
    y = torch.tensor([[-1.0, 0.0]], device=device, requires_grad=True)
    with fm.use_backend(backend):
        scores = fm.pair_scores(x, y, torch.ones(2, device=device))
        grads = torch.autograd.grad(scores.sum(), (x, y))
    assert (scores == 0).all() and (grads[0] == 0).all() and (grads[1] == 0).all()


@each_backend
@each_activation
@pytest.mark.parametrize("shape", [(0, 4, 3, 5), (2, 0, 3, 5), (2, 4, 0, 5), (2, 4, 3, 0)])
def test_sizes_of_zero(shape, activation, backend, device):
    leaves = [z.requires_grad_() for z in rows(*shape, dtype=torch.float32, device=device)]
    with fm.use_backend(backend):
        scores = fm.pair_scores(*leaves, activation=activation)
        grads = torch.autograd.grad(scores.sum(), leaves)
    assert torch.equal(scores, leaves[3][:, None, None].expand(shape[:3]))
    for leaf, g in zip(leaves[:3], grads[:3], strict=True):
        assert g.shape == leaf.shape and (g == 0).all()
    assert (grads[3] == shape[1] * shape[2]).all()


@each_backend
@each_activation
def test_numbers_that_are_not_finite_stay_in_their_rows(activation, backend, device):
    x, y, weight, bias = rows(dtype=torch.float32, device=device)
    x[0, 1, 2], y[1, 2, 0] = torch.nan, torch.inf
    with fm.use_backend(backend):
        scores = fm.pair_scores(x, y, weight, bias, activation)
    bad = torch.zeros(2, 4, 3, dtype=torch.bool)
    bad[0, 1] = True
    bad[1, :, 2] = activation != "tanh"  # tanh of infinity is 1
    assert torch.equal(~scores.isfinite().cpu(), bad)


@each_backend
@each_activation
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_are_summed_in_float32(dtype, activation, backend, device):
    """One rounding of each result: also of the weight's gradient, which all tasks share."""
    x, y, weight, bias = rows(3, 40, 30, 70, dtype, device)
    leaves = [z.requires_grad_() for z in (x, y, weight[0], bias[0])]
    wide = [z.detach().float().requires_grad_() for z in leaves]
    with fm.use_backend(backend):
        scores, exact = (fm.pair_scores(*z, activation=activation) for z in (leaves, wide))
        assert torch.equal(scores, exact.to(dtype))
        grads = torch.autograd.grad(scores.sum(), leaves)
        expected = torch.autograd.grad(exact.sum(), wide)
    for g, e in zip(grads, expected, strict=True):
        assert torch.equal(g, e.to(dtype))


@each_backend
@each_activation
def test_third_derivatives(activation, backend, device):
    leaves = [z.requires_grad_() for z in rows(1, 3, 2, 4, device=device)]

    def third():
        out = fm.pair_scores(*leaves, activation=activation).sin().sum()
        for _ in range(2):
            grads = torch.autograd.grad(out, leaves, create_graph=True)
            out = sum(g.sin().sum() for g in grads)
        return torch.autograd.grad(out, leaves)

    with fm.use_backend(backend):
        ours = third()
    with fm.use_backend("torch"):
        expected = third()
    for g, e in zip(ours, expected, strict=True):
        assert_near(g, e, 1e-12)


@needs_kernels
@each_activation
@pytest.mark.parametrize("shape", [(2, 4, 3, 5), (1, 300, 23, 33), (3, 7, 70, 65)])
def test_each_kernel_is_the_derivative_of_the_one_before(shape, activation, device):
    x, y, weight, bias = rows(*shape, device=device)
    x_dot, y_dot, weight_dot, bias_dot = (z.sin() for z in (x, y, weight, bias))
    point, dots = (x, y, weight), (x_dot, y_dot, weight_dot)

    def scores(*p):
        return reference.pair_scores(*p, activation)

    def gradient(*p):
        return vjp(scores, *p, bias)[1](g)[:3]

    out, pull = vjp(scores, *point, bias)
    g = torch.linspace(-1, 2, out.numel(), dtype=out.dtype, device=device).view(out.shape)
    assert_near(OPS.pair_scores(*point, bias, activation), out, 1e-13)
    for ours, e in zip(OPS.pair_scores_backward(g, *point, activation), pull(g), strict=True):
        assert_near(ours, e, 1e-12)
    tangent = vjp(pull, torch.zeros_like(out))[1]((*dots, bias_dot))[0]
    assert_near(OPS.pair_scores_tangent(*dots, bias_dot, *point, activation), tangent, 1e-12)
    # The Hessian is symmetric: a pullback of the gradient is its tangent.
    bends = vjp(gradient, *point)[1](dots)
    for ours, e in zip(OPS.pair_scores_bend(g, *dots, *point, activation), bends, strict=True):
        assert_near(ours, e, 1e-12)


@needs_kernels
def test_no_array_of_all_features_is_kept(device):
    x, y, weight, _ = rows(1, 64, 48, 256, torch.float32, device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda z: kept.append(z.numel()), lambda z: z):
        fm.pair_scores(x.requires_grad_(), y.requires_grad_(), weight.requires_grad_())
    assert sum(kept) <= x.numel() + y.numel() + 2 * weight.numel()


@needs_kernels
@pytest.mark.parametrize("suffix", ["", "_backward", "_tangent", "_bend"])
def test_opcheck(suffix, device):
    x, y, weight, bias = rows(dtype=torch.float32, device=device)
    g, dots = x.new_ones(2, 4, 3), (x.cos(), y.cos(), weight.cos())
    args = {
        "": (x, y, weight, bias),
        "_backward": (g, x, y, weight),
        "_tangent": (*dots, bias, x, y, weight),
        "_bend": (g, *dots, x, y, weight),
    }[suffix]
    op = getattr(OPS, f"pair_scores{suffix}").default
    assert set(torch.library.opcheck(op, (*args, "tanh")).values()) == {"SUCCESS"}


@needs_kernels
def test_the_raw_ops_refuse_what_they_would_read_out_of_bounds(device):
    x, y, weight, bias = rows(dtype=torch.float32, device=device)
    g = x.new_ones(2, 4, 3)
    for call in (
        lambda: OPS.pair_scores(x[0], y, weight, bias, "relu"),
        lambda: OPS.pair_scores(x, y[:1], weight, bias, "relu"),
        lambda: OPS.pair_scores(x, y[..., :3], weight, bias, "relu"),
        lambda: OPS.pair_scores(x, y.double(), weight, bias, "relu"),
        lambda: OPS.pair_scores(x, y, weight[:1], bias, "relu"),
        lambda: OPS.pair_scores(x, y, weight.double(), bias, "relu"),
        lambda: OPS.pair_scores(x, y, weight, bias[:1], "relu"),
        lambda: OPS.pair_scores(x, y, weight, bias, "gelu"),
        lambda: OPS.pair_scores(x.long(), y.long(), weight.long(), bias.long(), "relu"),
        lambda: OPS.pair_scores_backward(g[:, :3], x, y, weight, "relu"),
        lambda: OPS.pair_scores_backward(g.double(), x, y, weight, "relu"),
        lambda: OPS.pair_scores_tangent(x[:1], y, weight, bias, x, y, weight, "relu"),
        lambda: OPS.pair_scores_tangent(x, y, weight, bias[:1], x, y, weight, "relu"),
        lambda: OPS.pair_scores_bend(g, x, y[:, :2], weight, x, y, weight, "relu"),
        lambda: OPS.pair_scores_bend(g, x, y, weight[:1], x, y, weight, "relu"),
    ):
        with pytest.raises((RuntimeError, TypeError, ValueError)):
            call()


ERRORS = {
    "x": (lambda x, y, w, b: (1.0, y, w), TypeError, "x: expected a tensor, got float"),
    "y int": (
        lambda x, y, w, b: (x, y.long(), w),
        TypeError,
        "y: expected a floating-point tensor, got torch.int64",
    ),
    "x dims": (
        lambda x, y, w, b: (x[0, 0], y, w),
        ValueError,
        "x: expected shape [T, Q, H], got [5]",
    ),
    "features": (
        lambda x, y, w, b: (x, y[..., :2], w),
        ValueError,
        "x [T, Q, H] and y [T, N, H]: expected the same T and H, got [2, 4, 5] and [2, 3, 2]",
    ),
    "weight": (
        lambda x, y, w, b: (x, y, w[:, :4]),
        ValueError,
        "weight: expected shape [5] or [2, 5], got [2, 4]",
    ),
    "weight of a layer": (
        lambda x, y, w, b: (x[0], y[0], w[:1]),
        ValueError,
        "weight: expected shape [5], got [1, 5]",
    ),
    "weight dtype": (
        lambda x, y, w, b: (x, y, w.double()),
        TypeError,
        "weight: expected dtype torch.float32 like x, got torch.float64",
    ),
    "bias": (
        lambda x, y, w, b: (x, y, w, b[:1]),
        ValueError,
        "bias: expected shape [] or [2], got [1]",
    ),
    "bias number": (
        lambda x, y, w, b: (x, y, w, 1.0),
        TypeError,
        "bias: expected a tensor, got float",
    ),
    "activation": (
        lambda x, y, w, b: (x, y, w, b, "gelu"),
        ValueError,
        "activation: expected one of relu, tanh, silu, abs, got 'gelu'",
    ),
}


@each_backend
@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument(name, backend, device):
    arguments, kind, message = ERRORS[name]
    given = arguments(*rows(dtype=torch.float32, device=device))
    with fm.use_backend(backend), pytest.raises(kind, match=re.escape(message)):
        fm.pair_scores(*given)


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # `device` is a mere name
)
@given(
    activation=st.sampled_from(PAIR_ACTIVATIONS),
    sizes=st.tuples(*(st.integers(1, n) for n in (3, 400, 40, 70))),
)
def test_scores_of_any_shape(device, activation, sizes):
    case = Case("pair_scores", "any shape", lambda make: (), small=False)
    args, options = rows(*sizes, device=device), {"activation": activation}
    actual = value_and_grads(case, args, options)
    with fm.use_backend("torch"):
        expected = value_and_grads(case, args, options)
    for a, e in zip(actual, expected, strict=True):
        assert_near(a, e, 1e-12)
