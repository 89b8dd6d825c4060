"""Every op under torch.func, torch.compile and fake tensors."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jacrev, jvp, vmap
from torch.utils._triton import has_triton

import fastmeta as fm
from tests.helpers.assertions import each_backend, each_case, each_small_case, require_kernels
from tests.helpers.case import Case, CaseFactory
from tests.helpers.cases import SMALL_CASES, as_function
from tests.helpers.skips import OLD_DYNAMO, OLD_DYNAMO_REASON

each_op = pytest.mark.parametrize("op", fm.core.backend.OPS)


def setup(case: Case, device: str) -> tuple:
    return as_function(case, *case(torch.float64, device))


def scalar_of(function):
    return lambda *inputs: function(*inputs).sin().sum()


def stacked(inputs: tuple, size: int = 3) -> tuple:
    """`size` different samples of every input, along a new leading dimension."""
    return tuple(torch.stack([x * (1 + 0.1 * i) + 0.01 * i for i in range(size)]) for x in inputs)


def close(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@each_case
def test_dual_numbers_keep_their_tangent_without_grad_mode(case, device):
    """Where nothing is differentiated, an op skips autograd; forward mode needs no grad mode."""
    function, inputs = setup(case, device)
    directions = tuple(torch.ones_like(x) for x in inputs)
    expected = jvp(function, inputs, directions)[1]
    with torch.no_grad(), forward_ad.dual_level():
        out = function(*map(forward_ad.make_dual, inputs, directions))
        close(forward_ad.unpack_dual(out).tangent, expected)


@each_case
def test_vmap_equals_a_loop(case, device):
    function, inputs = setup(case, device)
    samples = stacked(inputs)
    loop = torch.stack([function(*one) for one in zip(*samples, strict=True)])
    close(vmap(function)(*samples), loop)
    last = tuple(x.movedim(0, -1).contiguous() for x in samples)
    close(vmap(function, in_dims=-1)(*last), loop)


@each_small_case
def test_vmap_over_one_input_at_a_time(case, device):
    function, inputs = setup(case, device)
    samples = stacked(inputs)
    for i in range(len(inputs)):
        dims = tuple(0 if j == i else None for j in range(len(inputs)))
        mixed = [samples[j] if j == i else inputs[j] for j in range(len(inputs))]
        loop = [function(*inputs[:i], one, *inputs[i + 1 :]) for one in samples[i]]
        close(vmap(function, in_dims=dims)(*mixed), torch.stack(loop))


@each_small_case
def test_grad_under_vmap_and_twice(case, device):
    function, inputs = setup(case, device)
    every = tuple(range(len(inputs)))
    first = grad(scalar_of(function), argnums=every)
    second = grad(lambda *z: sum(g.square().sum() for g in first(*z)), argnums=every)
    samples = stacked(inputs)
    for transform in (first, second):
        rows = [transform(*one) for one in zip(*samples, strict=True)]
        loop = tuple(torch.stack(column) for column in zip(*rows, strict=True))
        close(vmap(transform)(*samples), loop)
    with fm.use_backend("torch"):
        expected = second(*inputs)
    close(second(*inputs), expected)


@each_small_case
def test_forward_mode(case, device):
    function, inputs = setup(case, device)
    tangents = tuple(torch.cos(x) for x in inputs)
    every = tuple(range(len(inputs)))
    with fm.use_backend("torch"):
        expected = jvp(function, inputs, tangents)
        expected_over_reverse = jvp(grad(scalar_of(function), argnums=every), inputs, tangents)
        expected_jacobian = jacfwd(function)(*inputs)
    close(jvp(function, inputs, tangents), expected)
    close(jvp(grad(scalar_of(function), argnums=every), inputs, tangents), expected_over_reverse)
    close(jacfwd(function)(*inputs), expected_jacobian)
    close(jacrev(function)(*inputs), expected_jacobian)


@each_backend
@each_case
def test_fake_tensors_have_the_shape_and_dtype_of_real_ones(case, backend, device):
    for dtype in (torch.float32, torch.bfloat16):
        args, options = case(dtype, device)
        real = case.function(*args, **options)
        with fm.use_backend(backend), FakeTensorMode() as mode:
            fakes = [mode.from_tensor(a) if torch.is_tensor(a) else a for a in args]
            fake = case.function(*fakes, **options)
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())
        assert fake.device == real.device


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def grads_of(function, inputs: tuple) -> tuple:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(scalar_of(function)(*leaves), leaves)


@pytest.mark.rotating
@each_small_case
def test_compiled_whole_graph(case, device, fresh_dynamo):
    if OLD_DYNAMO and case.op == "linear_head" and "no_bias" in case.name:
        pytest.skip(OLD_DYNAMO_REASON)
    function, inputs = setup(case, device)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    close(compiled(*inputs), function(*inputs))
    close(grads_of(compiled, inputs), grads_of(function, inputs))


@pytest.mark.rotating
@each_small_case
def test_compiled_transforms_are_right(case, device, fresh_dynamo):
    """torch.compile loses an autograd.Function's derivative inside torch.func; ours must not."""
    function, inputs = setup(case, device)
    every = tuple(range(len(inputs)))
    gradient = vmap(grad(scalar_of(function), argnums=every))
    samples = stacked(inputs)
    close(
        torch.compile(gradient, fullgraph=True, backend="aot_eager")(*samples), gradient(*samples)
    )


@each_op
def test_compiled_graph_keeps_the_native_kernel(op, device, fresh_dynamo):
    require_kernels(device)
    case = next(c for c in SMALL_CASES if c.op == op)
    function, inputs = as_function(case, *case(torch.float32, device))
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph

    with fm.use_backend("native"):  # else PyTorch's own kernel may take a small one's place
        torch.compile(function, fullgraph=True, backend=backend)(*inputs)
    assert f"fastmeta.{op}" in graphs[0].print_readable(print_output=False)


@pytest.mark.rotating
@each_op
def test_compiled_by_inductor_with_any_number_of_tasks(op, device, fresh_dynamo):
    require_kernels(device)
    if device == "cuda" and not has_triton():
        pytest.skip("needs Triton")
    case = next(c for c in SMALL_CASES if c.op == op)
    function, inputs = as_function(case, *case(torch.float32, device))
    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    torch.testing.assert_close(grads_of(compiled, inputs), grads_of(function, inputs))


def raw_arguments(op: str, device: str) -> tuple:
    """Arguments of a compiled op, all of different sizes."""
    make = CaseFactory(torch.float32, device)
    x, y, w = make.randn(2, 4, 3), make.randn(2, 5, 3), make.randn(2, 4)
    labels = make.labels(5, 2, 4)
    ways = torch.arange(4).expand(2, 4).to(device), torch.arange(5).expand(2, 5).to(device)
    rates, head = make.randn(2, 6), (x, labels, y, make.randn(2, 5))
    kept = make.randn(2, 6, 5, 4), make.randn(2, 4, 4)
    p, g, lr = make.randn(2, 7), make.randn(2, 7), make.randn(1, 7)
    return {
        "inner_update": (p, g, lr),
        "inner_update_backward": (p, g, lr),
        "prototypes": (x, labels, 5),
        "prototypes_backward": (y, labels),
        "pairwise_distance": (x, y, "euclidean"),
        "pairwise_distance_backward": (make.randn(2, 4, 5), x, y, "euclidean"),
        "prototype_loss": (x, labels, y, "cosine", 2.0),
        "matching_loss": (x, ways[0], y, ways[1], "cosine", 2.0, False),
        "matching_loss_backward": (w, x, ways[0], y, ways[1], "sqeuclidean", 1.0, False),
        "linear_head": (*head, rates, "cross_entropy", 0.1, True),
        "linear_head_backward": (
            y,
            head[3],
            *head,
            rates,
            *kept,
            "cross_entropy",
            0.1,
            True,
            False,
            True,
        ),
        "prototype_loss_backward": (w, x, labels, y, "sqeuclidean", 1.0),
    }[op]


RAW_OPS = [f"{op}{suffix}" for op in fm.core.backend.OPS for suffix in ("", "_backward")]


@pytest.mark.parametrize("op", RAW_OPS)
def test_opcheck(op, device):
    require_kernels(device)
    overload = getattr(torch.ops.fastmeta, op).default
    results = torch.library.opcheck(overload, raw_arguments(op, device))
    assert set(results.values()) == {"SUCCESS"}
