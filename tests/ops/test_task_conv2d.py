"""Convolution and linear layers of each task: shapes, layouts, derivatives (those of batch norm too),
and the raw kernels.
"""

# ruff: noqa: E501 (for a table that reads best with one entry a line)

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jvp, vjp, vmap

import fastmeta as fm
from tests.helpers.assertions import BACKENDS, assert_near, value_and_grads
from tests.helpers.case import CaseFactory
from tests.helpers.cases import TASK_BATCH_NORM, TASK_CONV2D, as_function, conv_case
from tests.helpers.skips import EMULATED, OLD_DYNAMO, OLD_DYNAMO_REASON, needs_kernels

each_backend = pytest.mark.parametrize("backend", BACKENDS)
# Whose copies in float32 are made by all threads.
LARGE = conv_case("large", 1, 10, 18, 20, (14, 14), (3, 3), padding=1)
each_case = pytest.mark.parametrize("case", TASK_CONV2D, ids=str)
each_small_layer = pytest.mark.parametrize(
    "case", [c for c in (*TASK_CONV2D, *TASK_BATCH_NORM) if c.small], ids=str
)


def loop(x, weight, bias=None, **options):
    """The definition: torch's convolution, a task at a time."""
    biases = [None] * len(x) if bias is None else bias
    rows = zip(x, weight, biases, strict=True)
    return torch.stack([F.conv2d(*row, **options) for row in rows])


@each_backend
@each_case
def test_it_is_torchs_convolution_of_every_task(case, backend, device):
    args, options = case(torch.float64, device)
    batched = tuple(a.unsqueeze(0) for a in args) if args[0].dim() == 4 else args
    with fm.use_backend(backend):
        out = case.function(*args, **options)
    expected = loop(*batched, **options)
    assert_near(out, expected.view(out.shape), 1e-13)


@each_backend
@each_small_layer
def test_third_derivative(case, backend, device):
    """The second derivative's own derivative, against finite differences."""
    function, inputs = as_function(case, *case(torch.float64, device))
    inputs = tuple(x.requires_grad_() for x in inputs)

    def second(*leaves):
        value = function(*leaves).tanh().sum()
        first = torch.autograd.grad(value, leaves, create_graph=True)
        return torch.autograd.grad(sum(g.sin().sum() for g in first), leaves, create_graph=True)

    with fm.use_backend(backend):
        assert gradcheck(second, inputs, fast_mode=True)


@needs_kernels
@each_small_layer
def test_derivatives_of_a_vmapped_call(case, device):
    """As the functional engine takes them: vmap inside, first and second derivative around it."""
    function, inputs = as_function(case, *case(torch.float64, device))
    samples = tuple(torch.stack([x, x.cos()]).requires_grad_() for x in inputs)

    def total(*samples):
        return vmap(function)(*samples).sin().sum()

    assert gradcheck(vmap(function), samples, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(vmap(function), samples, fast_mode=True)
    vectors = tuple(x.detach().sin() for x in samples)
    gradients = grad(total, argnums=tuple(range(len(samples))))
    forward = jvp(gradients, samples, vectors)[1]
    reverse = vjp(gradients, *samples)[1](vectors)
    torch.testing.assert_close(forward, reverse, rtol=1e-10, atol=1e-12)


@each_backend
@each_case
def test_results_have_the_layout_of_the_images(case, backend, device):
    args, options = case(torch.float32, device)
    turned = args[0].movedim(-3, -1).contiguous().movedim(-1, -3)
    with fm.use_backend(backend):
        out = case.function(*args, **options)
        last = case.function(turned, *args[1:], **options)
    assert_near(last, out, 0 if backend == "native" else 5e-6)
    assert out.is_contiguous()
    assert turned.is_contiguous() or last.movedim(-3, -1).is_contiguous()


@needs_kernels
@pytest.mark.parametrize("channels", [1, 16, 19])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_gradients_have_the_layout_of_their_upstream(channels, layout, device):
    make = CaseFactory(torch.float32, device)
    x, weight = make.randn(2, 3, channels, 6, 5), make.randn(2, 18, channels, 3, 3)
    x, upstream = x.requires_grad_(), make.randn(2, 3, 18, 4, 3)
    plain = torch.autograd.grad(fm.task_conv2d(x, weight), x, upstream)[0]
    if layout == "channels-last":
        upstream = upstream.movedim(2, -1).contiguous().movedim(-1, 2)
    turned = torch.autograd.grad(fm.task_conv2d(x, weight), x, upstream)[0]
    assert torch.equal(turned, plain) and plain.is_contiguous()
    expected = turned.movedim(2, -1) if layout == "channels-last" else turned
    assert expected.is_contiguous()


@each_backend
@pytest.mark.parametrize("tasks, examples", [(0, 3), (2, 0), (0, 0)])
def test_without_tasks_or_examples(tasks, examples, backend, device):
    make = CaseFactory(torch.float32, device)
    shapes = (tasks, examples, 2, 5, 4), (tasks, 3, 2, 3, 3), (tasks, 3)
    leaves = [make.randn(*shape).requires_grad_() for shape in shapes]
    with fm.use_backend(backend):
        out = fm.task_conv2d(*leaves, padding=1)
        grads = torch.autograd.grad(out.sum(), leaves)
    assert out.shape == (tasks, examples, 3, 5, 4)
    for leaf, g in zip(leaves, grads, strict=True):
        assert g.shape == leaf.shape and (g == 0).all()


@needs_kernels
def test_weights_that_tasks_share(device):
    make = CaseFactory(torch.float64, device)
    x, weight, bias = make.randn(3, 2, 4, 6, 6), make.randn(5, 4, 3, 3), make.randn(5)
    shared = weight.expand(3, *weight.shape), bias.expand(3, 5)
    assert torch.equal(fm.task_conv2d(x, *shared), fm.task_conv2d(x, *(s.clone() for s in shared)))


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_are_summed_in_float32(dtype, backend, device):
    make = CaseFactory(dtype, device)
    x, weight = make.randn(2, 3, 40, 5, 5), make.randn(2, 6, 40, 3, 3)
    with fm.use_backend(backend):
        out = fm.task_conv2d(x, weight)
    assert_near(out, loop(x.float(), weight.float()), 0.51 * torch.finfo(dtype).eps)
    assert fm.backend_of("task_conv2d", device, dtype) == BACKENDS[0]


@needs_kernels
@pytest.mark.skipif(EMULATED, reason="tensor cores sum in another order than float32's kernels")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [*TASK_CONV2D, LARGE], ids=str)
def test_half_types_on_a_cpu_are_float32_rounded_once(case, dtype):
    """The output, its bias included, and the gradients of images and weights."""
    args, options = case(dtype)
    actual = value_and_grads(case, args, options)
    expected = value_and_grads(case, tuple(a.float() for a in args), options, dtype)
    for a, e in zip(actual[:3], expected[:3], strict=True):
        rounding = torch.finfo(dtype).eps / 2 * e.abs() + 2e-6 * e.abs().max()
        assert ((a.float() - e).abs() <= rounding).all()


@pytest.mark.rotating
@needs_kernels
@pytest.mark.parametrize("op", ["task_conv2d", "task_conv2d_input", "task_conv2d_weight"])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("groups", [1, 6])
def test_opcheck(op, groups, layout, device):
    make = CaseFactory(torch.float32, device)
    x, weight, bias = (
        make.randn(2, 3, 6, 5, 4),
        make.randn(2, 12, 6 // groups, 3, 2),
        make.randn(2, 12),
    )
    if layout == "channels-last":
        x = x.movedim(2, -1).contiguous().movedim(-1, 2)
    options = ([2, 1], [1, 0], [1, 2], groups)
    grad = torch.ops.fastmeta.task_conv2d(x, weight, bias, *options)
    args = {
        "task_conv2d": (x, weight, bias),
        "task_conv2d_input": (grad, weight, [5, 4]),
        "task_conv2d_weight": (grad, x, [3, 2]),
    }[op]
    results = torch.library.opcheck(getattr(torch.ops.fastmeta, op).default, (*args, *options))
    assert set(results.values()) == {"SUCCESS"}


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@needs_kernels
@pytest.mark.skipif(OLD_DYNAMO, reason=OLD_DYNAMO_REASON)
@pytest.mark.parametrize("groups", [1, 3])
def test_compiled_for_any_number_of_tasks(groups, device, fresh_dynamo):
    """One graph serves them all, and the kernels of the output and both gradients are in it."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.print_readable(print_output=False))
        return graph

    def loss(x, weight, bias):
        return fm.task_conv2d(x, weight, bias, stride=2, padding=1, groups=groups).sin().sum()

    def gradients(call, *inputs):
        leaves = [x.requires_grad_() for x in inputs]
        return torch.autograd.grad(call(*leaves), leaves)

    compiled = torch.compile(
        loss, fullgraph=True, dynamic=True, backend=aot_autograd(fw_compiler=backend)
    )
    make = CaseFactory(torch.float64, device)
    for tasks, examples in ((2, 4), (3, 5)):
        inputs = (
            make.randn(tasks, examples, 3, 7, 6),
            make.randn(tasks, 6, 3 // groups, 3, 3),
            make.randn(tasks, 6),
        )
        actual, expected = gradients(compiled, *inputs), gradients(loss, *inputs)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert len(graphs) == 2  # forward and backward
    for name in ("task_conv2d.", "task_conv2d_input.", "task_conv2d_weight."):
        assert f"fastmeta.{name}" in "".join(graphs)


@needs_kernels
def test_raw_kernels_check_what_memory_safety_needs(device):
    make = CaseFactory(torch.float32, device)
    x, weight = make.randn(2, 3, 6, 5, 4), make.randn(2, 12, 6, 3, 2)
    ops, options = torch.ops.fastmeta, ([1, 1], [0, 0], [1, 1], 1)
    grad = ops.task_conv2d(x, weight, None, *options)
    for call in (
        lambda: ops.task_conv2d(x, weight[:1], None, *options),
        lambda: ops.task_conv2d(x, weight[:, :, :5], None, *options),
        lambda: ops.task_conv2d(x, weight.double(), None, *options),
        lambda: ops.task_conv2d(x.long(), weight.long(), None, *options),
        lambda: ops.task_conv2d(x, weight, weight[:, :5, 0, 0, 0], *options),
        lambda: ops.task_conv2d(x, weight, None, [0, 1], *options[1:]),
        lambda: ops.task_conv2d(x, weight, None, *options[:3], 2),
        lambda: ops.task_conv2d(x[..., :1], weight, None, *options),
        lambda: ops.task_conv2d_input(grad, weight, [6, 4], *options),
        lambda: ops.task_conv2d_weight(grad, x, [2, 2], *options),
        lambda: ops.task_conv2d_weight(grad, x, [3, 2], *options[:3], 0),
    ):
        with pytest.raises((RuntimeError, TypeError)):
            call()


BAD_INPUT = {
    "x number": (lambda x, w, b: fm.task_conv2d(1.0, w), TypeError, "x: expected a tensor, got float"),
    "x int": (lambda x, w, b: fm.task_conv2d(x.long(), w), TypeError, "x: expected a floating-point tensor, got torch.int64"),
    "x dims": (lambda x, w, b: fm.task_conv2d(x[0, 0], w), ValueError, "x: expected shape [T, B, C, H, W], got [4, 6, 5]"),
    "weight dims": (lambda x, w, b: fm.task_conv2d(x, w[0, 0]), ValueError, "weight: expected shape [T, O, C / groups, kh, kw], got [4, 3, 2]"),
    "one unbatched": (lambda x, w, b: fm.task_conv2d(x[0], w), ValueError, "expected the same T, got [3, 4, 6, 5] and [2, 8, 4, 3, 2]"),
    "tasks": (lambda x, w, b: fm.task_conv2d(x, w[:1]), ValueError, "expected the same T, got [2, 3, 4, 6, 5] and [1, 8, 4, 3, 2]"),
    "dtype": (lambda x, w, b: fm.task_conv2d(x, w.double()), TypeError, "weight: expected dtype torch.float32 like x, got torch.float64"),
    "bias dtype": (lambda x, w, b: fm.task_conv2d(x, w, b.double()), TypeError, "bias: expected dtype torch.float32 like x"),
    "bias": (lambda x, w, b: fm.task_conv2d(x, w, b[:, :7]), ValueError, "bias: expected shape [2, 8], got [2, 7]"),
    "bias unbatched": (lambda x, w, b: fm.task_conv2d(x[0], w[0], b), ValueError, "bias: expected shape [8], got [2, 8]"),
    "channels": (lambda x, w, b: fm.task_conv2d(x[:, :, :3], w), ValueError, "weight: expected 3 channels, C / groups of x [2, 3, 3, 6, 5], got [2, 8, 4, 3, 2]"),
    "no channels": (lambda x, w, b: fm.task_conv2d(x[:, :, :0], w[:, :, :0]), ValueError, "x and weight: expected channels, outputs, height and width of at least 1"),
    "groups": (lambda x, w, b: fm.task_conv2d(x, w, groups=3), ValueError, "groups: expected a divisor of 4 channels and 8 outputs, got 3"),
    "groups type": (lambda x, w, b: fm.task_conv2d(x, w, groups=2.0), TypeError, "groups: expected an integer, got 2.0"),
    "stride": (lambda x, w, b: fm.task_conv2d(x, w, stride=0), ValueError, "stride: expected one or two integers of at least 1, got 0"),
    "stride type": (lambda x, w, b: fm.task_conv2d(x, w, stride=1.5), TypeError, "stride: expected one or two integers, got 1.5"),
    "dilation": (lambda x, w, b: fm.task_conv2d(x, w, dilation=(1, 1, 1)), ValueError, "dilation: expected one or two integers of at least 1, got (1, 1, 1)"),
    "padding": (lambda x, w, b: fm.task_conv2d(x, w, padding=-1), ValueError, "padding: expected one or two integers of at least 0, got -1"),
    "padding name": (lambda x, w, b: fm.task_conv2d(x, w, padding="full"), ValueError, "padding: expected integers, 'same' or 'valid', got 'full'"),
    "same": (lambda x, w, b: fm.task_conv2d(x, w, stride=2, padding="same"), ValueError, "stride: expected 1 with padding='same', got (2, 2)"),
    "small": (lambda x, w, b: fm.task_conv2d(x, w, dilation=3), ValueError, "x: expected padded images at least as large as the kernel"),
    "linear": (lambda x, w, b: fm.task_linear(x[..., 0, 0], w[..., :3, 0, 0]), ValueError, "expected the same I, got [2, 3, 4] and [2, 8, 3]"),
    "linear dims": (lambda x, w, b: fm.task_linear(x, w), ValueError, "x: expected shape [T, B, I], got [2, 3, 4, 6, 5]"),
    "linear bias": (lambda x, w, b: fm.task_linear(x[..., 0, 0], w[..., 0, 0], b[:1]), ValueError, "bias: expected shape [2, 8], got [1, 8]"),
}  # fmt: skip


@each_backend
@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_named(name, backend, device):
    make = CaseFactory(torch.float32, device)
    call, error, message = BAD_INPUT[name]
    with fm.use_backend(backend), pytest.raises(error, match=re.escape(message)):
        call(make.randn(2, 3, 4, 6, 5), make.randn(2, 8, 4, 3, 2), make.randn(2, 8))
