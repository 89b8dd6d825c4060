"""What only a CUDA device shows: labels, streams, captured graphs, and tensors on two devices."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta as fm
from fastmeta.engines.base import Examples
from fastmeta.engines.functional.engine import FunctionalEngine
from tests.helpers.assertions import (
    TOLERANCE,
    assert_near,
    each_backend,
    require_kernels,
    value_and_grads,
)
from tests.helpers.case import Case, CaseFactory
from tests.helpers.cases import CASES
from tests.helpers.networks import Tasks, build, classification, relative_error
from tests.helpers.unrolled import vmapped_meta_loss

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")

# Each op with several blocks and launches, and every kind of step size that Python prepares.
NAMES = ("number", "per_layer", "blocks-3000-per_task", "slices", "cosine-2x7x65x17")
NAMES += ("sqeuclidean-mean-2x7x65x17", "cosine-none-1x130x129x65")
each_op = pytest.mark.parametrize("case", [c for c in CASES if c.name in NAMES], ids=str)


# Labels


def prototypes(labels: Tensor) -> Tensor:
    return fm.prototypes(CaseFactory(torch.float32, "cuda").randn(*labels.shape, 3), labels, 5)


def loss(labels: Tensor) -> Tensor:
    make = CaseFactory(torch.float32, "cuda")
    query, means = make.randn(*labels.shape, 3), make.randn(len(labels), 5, 3)
    return fm.prototype_loss(query, labels, means, reduction="none")


def prototypes_backward(labels: Tensor) -> Tensor:
    grad = CaseFactory(torch.float32, "cuda").randn(len(labels), 5, 3)
    return torch.ops.fastmeta.prototypes_backward(grad, labels)


def loss_backward(labels: Tensor) -> Tensor:
    make = CaseFactory(torch.float32, "cuda")
    query, means = make.randn(*labels.shape, 3), make.randn(len(labels), 5, 3)
    rows = (make.randn(*labels.shape), query, labels, means)
    return torch.ops.fastmeta.prototype_loss_backward(*rows, "sqeuclidean", 1.0)[1]


# The last is behind 64 parts of 256 labels, what the check reads in one go.
@pytest.mark.parametrize(
    ("task", "example", "label"), [(0, 0, -2), (1, 7, 5), (2, 9_999, 2**40), (0, 9_000, -(2**63))]
)
@pytest.mark.parametrize("op", [prototypes, loss, prototypes_backward, loss_backward])
def test_the_first_wrong_label_is_named_and_the_op_goes_on(op, task, example, label):
    require_kernels("cuda")
    labels = CaseFactory(device="cuda").labels(5, 3, 10_000)
    expected = op(labels)
    wrong = labels.clone()
    wrong[task, example:] = label
    message = f"labels[{task}, {example}] is {label}, expected 0 <= label < 5"
    with pytest.raises(ValueError, match=re.escape(message)):
        op(wrong)
    torch.cuda.synchronize()
    assert torch.equal(op(labels), expected)


@pytest.mark.parametrize("name", ["support_y", "query_y"])
def test_a_wrong_label_of_a_task_leaves_the_context_usable(name):
    maml, tasks = fm.MAML(build("mlp", "cuda")), classification("mlp", "cuda")
    expected = maml.meta_loss(*tasks)[0]
    wrong = getattr(tasks, name) + 4
    with pytest.raises(ValueError, match=f"{name}: expected labels in 0..3"):
        maml.meta_loss(*tasks._replace(**{name: wrong}))
    torch.cuda.synchronize()
    assert torch.equal(maml.meta_loss(*tasks)[0], expected)


# Streams


def random_arguments(case: Case, seed: int) -> tuple:
    return case.build(CaseFactory(torch.float32, "cuda", seed))


@each_op
def test_work_runs_on_the_current_stream(case):
    """While the default stream is busy, another stream gets the op's results, the same bits."""
    args, options = random_arguments(case, seed=0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # loads kernels and takes memory, which would wait for all work
        value_and_grads(case, *random_arguments(case, seed=1))
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)  # cycles, about half a second
    busy = torch.cuda.Event()
    busy.record()
    with torch.cuda.stream(side):
        actual = [tensor.cpu() for tensor in value_and_grads(case, args, options)]
    assert not busy.query()
    for a, e in zip(actual, value_and_grads(case, args, options), strict=True):
        assert torch.equal(a, e.cpu())


@each_op
def test_work_waits_for_what_its_stream_did_before(case):
    args, options = random_arguments(case, seed=0)
    later, _ = random_arguments(case, seed=1)
    expected = case.function(*later, **options)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)
        for old, new in zip(args, later, strict=True):
            if isinstance(old, Tensor):
                old.copy_(new)
        actual = case.function(*args, **options).cpu()
    assert torch.equal(actual, expected.cpu())


# Captured graphs


def capture(run: Callable[[], tuple[Tensor, ...]]) -> tuple[torch.cuda.CUDAGraph, tuple]:
    """The graph of a call, after calls that set up what cannot be captured, and its outputs."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    return graph, outputs


@each_backend
@each_op
def test_a_captured_op_and_its_gradient_replay_to_the_same_bits(case, backend):
    args, options = random_arguments(case, seed=0)
    leaves = [a.requires_grad_() for a in args if isinstance(a, Tensor) and a.is_floating_point()]

    def step() -> tuple[Tensor, ...]:
        value = case.function(*args, **options).sin().sum()
        return value.detach(), *torch.autograd.grad(value, leaves)

    with fm.use_backend(backend):
        graph, outputs = capture(step)
        with torch.no_grad():
            for old, new in zip(args, random_arguments(case, seed=1)[0], strict=True):
                if isinstance(old, Tensor):
                    old.copy_(new)
        graph.replay()
        for replayed, expected in zip(outputs, step(), strict=True):
            assert torch.equal(replayed, expected)


@each_backend
def test_a_wrong_label_in_a_captured_loss_gives_nan(backend):
    make = CaseFactory(torch.float32, "cuda")
    labels, rows = make.labels(5, 2, 4), (make.randn(2, 4, 3), make.randn(2, 5, 3))
    query, means = (x.requires_grad_() for x in rows)

    def step() -> tuple[Tensor, ...]:
        each = fm.prototype_loss(query, labels, means, reduction="none")
        mean = fm.prototype_loss(query, labels, means)
        return each.detach(), mean.detach(), *torch.autograd.grad(mean, (query, means))

    with fm.use_backend(backend):
        graph, (each, mean, grad_query, grad_means) = capture(step)
        graph.replay()
        right = [tensor.clone() for tensor in (each, mean, grad_query, grad_means)]
        before = labels[0, 1].clone()
        labels[0, 1] = 5
        graph.replay()
        assert mean.isnan()
        assert each.isnan().nonzero().tolist() == [[0, 1]]
        assert grad_query.isnan().all(-1).nonzero().tolist() == [[0, 1]]
        assert grad_means[0].isnan().any() and grad_means[1].isfinite().all()
        labels[0, 1] = before
        graph.replay()
        for a, e in zip((each, mean, grad_query, grad_means), right, strict=True):
            assert torch.equal(a, e)


@each_backend
def test_an_example_with_a_wrong_label_is_in_no_captured_prototype(backend):
    make = CaseFactory(torch.float32, "cuda")
    x, labels = make.randn(2, 6, 3).requires_grad_(), make.labels(4, 2, 6)

    def step() -> tuple[Tensor, ...]:
        means = fm.prototypes(x, labels, 4)
        return means.detach(), *torch.autograd.grad(means.sin().sum(), x)

    with fm.use_backend(backend):
        graph, (means, gradient) = capture(step)
        labels[1, 2] = 4
        graph.replay()
        expected = fm.prototypes(x, labels, 5)[:, :4]
        (expected_gradient,) = torch.autograd.grad(expected.sin().sum(), x)
        torch.testing.assert_close(means, expected.detach())
        torch.testing.assert_close(gradient, expected_gradient)
        assert not gradient[1, 2].any()


# Meta-gradients that become graphs by themselves


def as_values(maml: fm.MAML, tasks: Tasks) -> list[Tensor]:
    return list(maml.meta_gradient(*tasks)[:3])


def by_autograd(maml: fm.MAML, tasks: Tasks) -> list[Tensor]:
    maml.zero_grad()
    loss, outputs = maml.meta_loss(*tasks)
    loss.backward()
    return [loss.detach(), outputs, *(p.grad for p in maml.module.parameters())]


def graphed_and_plain(cuda_graph: bool | str = "auto") -> tuple[fm.MAML, fm.MAML]:
    require_kernels("cuda")
    options = ({"cuda_graph": cuda_graph}, {"cuda_graph": False})
    return tuple(fm.MAML(build("conv4", "cuda"), 0.1, 2, engine="program", **o) for o in options)


def other_values(seed: int, tasks: int = 3) -> Tasks:
    make, given = CaseFactory(torch.float64, "cuda", seed), classification("conv4", "cuda", tasks)
    support_y, query_y = (make.labels(4, *y.shape) for y in (given.support_y, given.query_y))
    return Tasks(make.randn(*given[0].shape), support_y, make.randn(*given[2].shape), query_y)


def step_both(*learners: fm.MAML) -> None:
    with torch.no_grad():
        for p, q in zip(*(maml.module.parameters() for maml in learners), strict=True):
            p.mul_(1.01)
            q.copy_(p)


each_way = pytest.mark.parametrize("way", [as_values, by_autograd])


@each_way
@pytest.mark.parametrize("cuda_graph", ["auto", True])
def test_graphs_of_meta_gradients_give_the_same_bits_and_results_stay(way, cuda_graph):
    graphed, plain = graphed_and_plain(cuda_graph)
    results = []
    for seed in range(7):
        step_both(graphed, plain)
        tasks = other_values(seed, 2 if seed == 4 else 3)
        results.append((way(graphed, tasks), [x.clone() for x in way(plain, tasks)]))
    graphs = graphed._programs.graphs
    assert len(graphs) == (1 if cuda_graph == "auto" else 2) and not graphs.refusals()
    for actual, expected in results:
        assert all(map(torch.equal, actual, expected))


@each_way
@pytest.mark.parametrize("name", ["support_y", "query_y"])
def test_a_wrong_label_is_refused_before_a_replay(way, name):
    graphed, plain = graphed_and_plain(True)
    tasks, expected = other_values(0), way(plain, other_values(0))
    assert all(map(torch.equal, way(graphed, tasks), expected))
    wrong = getattr(tasks, name) + 4
    with pytest.raises(ValueError, match=f"{name}: expected labels in 0..3"):
        way(graphed, tasks._replace(**{name: wrong}))
    torch.cuda.synchronize()
    assert all(map(torch.equal, way(graphed, tasks), expected))


def test_replays_on_other_streams_wait_for_each_other():
    graphed, plain = graphed_and_plain(True)
    streams = [torch.cuda.current_stream(), *(torch.cuda.Stream() for _ in range(3))]
    expected = [as_values(plain, other_values(seed)) for seed in range(8)]
    inputs = [other_values(seed) for seed in range(8)]
    as_values(graphed, inputs[0])
    torch.cuda.synchronize()
    actual = []
    for i, tasks in enumerate(inputs):
        with torch.cuda.stream(streams[i % 4]):
            actual.append(as_values(graphed, tasks))
    torch.cuda.synchronize()
    for a, e in zip(actual, expected, strict=True):
        assert all(map(torch.equal, a, e))


def test_a_learner_with_graphs_can_be_captured_by_its_caller():
    graphed, plain = graphed_and_plain(True)
    tasks, later = other_values(0), other_values(1)
    graph, outputs = capture(lambda: tuple(as_values(graphed, tasks)))
    for old, new in zip(tasks, later, strict=True):
        old.copy_(new)
    graph.replay()
    assert all(map(torch.equal, outputs, as_values(plain, later)))


def test_graphs_free_their_memory_with_their_learner():
    graphed, _ = graphed_and_plain(True)
    as_values(graphed, other_values(0))
    graphed._programs.graphs.clear()
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    as_values(graphed, other_values(0))
    assert torch.cuda.memory_reserved() > before
    del graphed
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before


# Tensors on two devices

X, Y, P = torch.zeros(2, 4, 3), torch.zeros(2, 5, 3), torch.zeros(2, 7)
LABELS = torch.zeros(2, 4, dtype=torch.int64)
matching = fm.matching_loss
MIXED = {  # tensors moved by `to` are on the GPU, and the one named is not
    "pairwise_distance": (lambda to: fm.pairwise_distance(to(X), Y), "y"),
    "prototypes": (lambda to: fm.prototypes(to(X), LABELS, 5), "labels"),
    "prototype_loss": (lambda to: fm.prototype_loss(to(X), to(LABELS), Y), "prototypes"),
    "prototype_loss labels": (lambda to: fm.prototype_loss(to(X), LABELS, to(Y)), "query_labels"),
    "matching_loss": (lambda to: matching(to(X), to(LABELS), to(X), LABELS), "support_labels"),
    "matching_loss support": (lambda to: matching(to(X), to(LABELS), X, to(LABELS)), "support"),
    "matching_logits": (lambda to: fm.matching_logits(to(X), X, to(LABELS), 1), "support"),
    "inner_update": (lambda to: fm.inner_update(to(P), P, 0.1), "grads"),
    "inner_update lr": (lambda to: fm.inner_update(to(P), to(P), P), "lr"),
    "inner_update tree": (lambda to: fm.inner_update([to(P)], [P], 0.1), "grads"),
    "hvp": (lambda to: fm.hvp(lambda theta: theta.sum(), to(P), P), "vector"),
    "ProtoNet": (lambda to: proto_loss(to, query_x=Y), "query_x"),
    "ProtoNet labels": (lambda to: proto_loss(to, support_y=LABELS), "labels"),
    "MAML lr": (lambda to: fm.MAML(build("mlp", "cuda"), nn.Parameter(P.double()[0])), "lr"),
    "MAML support": (lambda to: maml_loss("support_x"), "support_x"),
    "MAML labels": (lambda to: maml_loss("query_y"), "query_y"),
    "theta": (lambda to: adapted_from_the_cpu(), "theta"),
}  # fmt: skip


def proto_loss(to: Callable[[Tensor], Tensor], **changed: Tensor) -> Tensor:
    episode = {"support_x": to(X), "support_y": to(LABELS), "query_x": to(Y)}
    query_y = to(torch.zeros(2, 5, dtype=torch.int64))
    return fm.ProtoNet(nn.Identity()).meta_loss(**{**episode, "query_y": query_y, **changed})[0]


def maml_loss(on_the_cpu: str) -> Tensor:
    tasks = classification("mlp", "cuda")
    left = {on_the_cpu: getattr(tasks, on_the_cpu).cpu()}
    return fm.MAML(build("mlp", "cuda")).meta_loss(*tasks._replace(**left))[0]


def adapted_from_the_cpu() -> Tensor:
    engine = FunctionalEngine(build("mlp", "cuda"), F.cross_entropy)
    return engine.adapt(
        engine.parameters().cpu(), 0.1, Examples(*classification("mlp", "cuda")[:2])
    )


@pytest.mark.parametrize("name", MIXED)
def test_tensors_of_a_cpu_among_those_of_a_gpu_are_refused(name):
    call, argument = MIXED[name]
    with pytest.raises(ValueError, match=rf"^{argument}\b.* cuda:0\b.* got cpu$"):
        call(lambda tensor: tensor.to("cuda:0"))


def test_tensors_of_a_gpu_among_those_of_a_cpu_are_refused():
    for call in (
        lambda: fm.pairwise_distance(X, Y.cuda()),
        lambda: fm.prototypes(X, LABELS.cuda(), 5),
        lambda: fm.inner_update(P, P.cuda(), 0.1),
        lambda: fm.hvp(lambda theta: theta.sum(), P, P.cuda()),
    ):
        with pytest.raises(ValueError, match=r" cpu\b.* got cuda:0$"):
            call()


def test_a_step_size_that_is_one_number_may_stay_on_the_cpu():
    params = CaseFactory(torch.float32, "cuda").randn(2, 7)
    expected = fm.inner_update(params, params, 0.25)
    assert torch.equal(fm.inner_update(params, params, torch.tensor(0.25)), expected)


# A second device


@two_devices
@pytest.mark.parametrize("current", [0, 1])
@each_op
def test_an_op_runs_where_its_tensors_are(case, current):
    with fm.use_backend("torch"):
        expected = value_and_grads(case, *case(torch.float64))
    with torch.cuda.device(current):
        actual = value_and_grads(case, *case(torch.float32, "cuda:1"))
        assert torch.cuda.current_device() == current
    for a, e in zip(actual, expected, strict=True):
        assert a.device == torch.device("cuda:1")
        assert_near(a, e, TOLERANCE[torch.float32])


@two_devices
@pytest.mark.parametrize("current", [0, 1])
def test_labels_are_checked_where_they_are(current):
    x, labels = (
        CaseFactory(device="cuda:1").randn(1, 4, 3),
        torch.tensor([[0, 1, 9, 0]], device="cuda:1"),
    )
    with torch.cuda.device(current):
        with pytest.raises(ValueError, match=re.escape("labels[0, 2] is 9")):
            fm.prototypes(x, labels, 2)
        assert torch.cuda.current_device() == current
        assert fm.prototypes(x, labels % 2, 2).device == x.device


@two_devices
@pytest.mark.parametrize("current", [0, 1])
def test_the_engine_draws_the_random_numbers_of_its_device(current):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.4), nn.Linear(8, 4)).double().to("cuda:1")
    tasks = classification("mlp", "cuda:1")
    with torch.cuda.device(current):
        torch.manual_seed(5)
        unrolled = vmapped_meta_loss(net, tasks, F.cross_entropy, 0.1, 2)
        expected = torch.autograd.grad(unrolled, list(net.parameters()))
        torch.manual_seed(5)
        value = fm.MAML(net, 0.1, steps=2).meta_loss(*tasks)[0]
        actual = torch.autograd.grad(value, list(net.parameters()))
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) < 1e-10


@two_devices
@pytest.mark.parametrize("current", [0, 1])
def test_graphs_are_made_where_the_parameters_are(current):
    require_kernels("cuda")
    tasks = classification("conv4", "cuda:1")
    graphed, plain = (fm.MAML(build("conv4", "cuda:1"), 0.1, cuda_graph=on) for on in (True, False))
    with torch.cuda.device(current):
        for _ in range(2):
            assert all(map(torch.equal, as_values(graphed, tasks), as_values(plain, tasks)))
        assert torch.cuda.current_device() == current
