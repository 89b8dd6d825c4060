"""What bindings and launchers do with the runtime: streams, devices, errors, sizes past 2^31."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import fastmeta as fm
from tests.cuda_emulation import emulator
from tests.cuda_emulation.checks import no_fill
from tests.helpers.assertions import TOLERANCE, assert_near, value_and_grads
from tests.helpers.case import METRICS, Case, CaseFactory
from tests.helpers.cases import inner_update_case
from tests.helpers.row_cases import distance_case, loss_case, prototypes_case

# With two tiles of prototypes, and cosine's norms: as many launches as an op ever makes.
CASES = [
    inner_update_case("scalar", (3, 5000), lambda make: make.randn()),
    inner_update_case("per_element", (3, 50), lambda make: make.randn(50)),
    prototypes_case("small", 2, 7, 3, 5),
    distance_case("cosine", 2, 7, 65, 17),
    loss_case("cosine", "none", 2, 7, 65, 17),
    loss_case("sqeuclidean", "mean", 2, 7, 5, 17),
]
each_case = pytest.mark.parametrize("case", CASES, ids=str)


def run(case: Case) -> tuple[torch.Tensor, ...]:
    return value_and_grads(case, *case(torch.float32))


@each_case
def test_work_goes_to_the_current_stream_of_the_tensors_device(case):
    with emulator.devices(current=0, of_tensors=1), emulator.current_stream(device=1, stream=1):
        with emulator.launches() as launches:
            run(case)
        assert emulator.current_device() == 0
    assert launches
    assert {(launch.device, launch.stream) for launch in launches} == {(1, 1)}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("make_case", [distance_case, lambda *a: loss_case(a[0], "none", *a[1:])])
def test_small_tiles_walk_many_columns_where_large_ones_would_be_few(make_case, metric):
    case = make_case(metric, 1, 70, 129, 65)
    args, options = case(torch.float32)
    with emulator.launches() as large:
        value_and_grads(case, args, options)
    with emulator.multiprocessors(1000), emulator.launches() as small:
        actual = value_and_grads(case, args, options)
    assert {launch.shared_bytes for launch in large} != {launch.shared_bytes for launch in small}
    exact = [a.double() if a.is_floating_point() else a for a in args]
    with fm.use_backend("torch"):
        expected = value_and_grads(case, tuple(exact), options)
    for a, e in zip(actual, expected, strict=True):
        assert_near(a, e, TOLERANCE[torch.float32])


@each_case
def test_every_launch_is_checked(case):
    with emulator.launches() as launches:
        expected = run(case)
    for after in range(len(launches)):
        message = rf"^({case.op}(_backward)?|(query_)?labels): too many resources requested"
        with emulator.failing_launch(after), pytest.raises(RuntimeError, match=message):
            run(case)
    for a, e in zip(run(case), expected, strict=True):
        assert torch.equal(a, e)


@each_case
def test_an_error_that_another_library_left_is_not_ours(case):
    """cudaGetLastError() returns it to whoever asks first, so nobody asks."""
    expected = run(case)
    emulator.leave_error(emulator.INVALID_VALUE)
    for a, e in zip(run(case), expected, strict=True):
        assert torch.equal(a, e)
    assert emulator.take_error() == emulator.INVALID_VALUE


def test_an_error_of_ours_is_not_left_to_others():
    with emulator.failing_launch(0), pytest.raises(RuntimeError, match="too many resources"):
        run(CASES[0])
    assert emulator.take_error() == 0


@pytest.mark.parametrize(
    "case",
    [
        inner_update_case("no task", (0, 3), lambda make: make.randn()),
        inner_update_case("no parameter", (3, 0), lambda make: make.randn()),
        distance_case("cosine", 0, 2, 2, 3),
        distance_case("cosine", 2, 0, 2, 3),
        distance_case("cosine", 2, 2, 0, 3),
        loss_case("cosine", "sum", 0, 2, 2, 3),
        loss_case("cosine", "sum", 2, 0, 2, 3),
    ],
    ids=str,
)
def test_nothing_is_launched_for_an_empty_output(case):
    with emulator.launches() as launches:
        run(case)
    assert launches == []


def test_no_launch_has_no_blocks():
    """Which the runtime refuses: classes without examples, rows without features."""
    for case in (prototypes_case("", 2, 0, 3, 5), loss_case("cosine", "sum", 2, 3, 2, 0)):
        run(case)


@pytest.mark.parametrize("count", [1, 255, 256, 257, 64 * 256 + 1])
@pytest.mark.parametrize("bad", [-2, 3])
def test_a_label_out_of_range_is_found_wherever_it_is(count, bad):
    x = torch.zeros(1, count, 1)
    for place in {0, count // 2, count - 1}:
        labels = torch.zeros(1, count, dtype=torch.int64)
        labels[0, place] = bad
        message = rf"labels\[0, {place}\] is {bad}"
        with pytest.raises(ValueError, match=message):
            fm.prototypes(x, labels, 3)
        labels[0, place] = 2
        assert (fm.prototypes(x, labels, 3) == 0).all()  # the device goes on


def test_while_capturing_labels_are_not_read_back():
    make = CaseFactory(torch.float32)
    query, prototypes = make.randn(1, 3, 4), make.randn(1, 2, 4)
    labels = torch.tensor([[0, 7, 1]])
    with emulator.capturing(), emulator.launches() as launches:
        loss = fm.prototype_loss(query, labels, prototypes, reduction="none")
    assert loss.isnan().tolist() == [[False, True, False]]
    assert len(launches) == 1


def test_while_capturing_a_query_without_support_is_infinite():
    """Its gradient is the softmax over all supports, as r is 0; other queries are as usual."""
    make = CaseFactory(torch.float64)
    query, support, weight = make.randn(2, 3, 4), make.randn(2, 5, 4), make.randn(2, 3)
    labels = torch.tensor([[0, 7, 1], [-1, 0, -3]])
    of_support = torch.tensor([[0, 1, 1, -1, 3], [0, 0, -1, -1, -1]])
    for metric in ("dot", "sqeuclidean"):
        args = (query, labels, support, of_support, metric, 1.0, False)
        with emulator.capturing():
            loss, grad_query, _ = torch.ops.fastmeta.matching_loss_backward(weight, *args)
            assert torch.equal(
                torch.ops.fastmeta.matching_loss(*args).nan_to_num(), loss.nan_to_num()
            )
        assert loss.isinf().tolist() == [[False, True, False], [False, False, False]]
        assert loss.isnan().tolist() == [[False, False, False], [False, False, True]]
        assert loss[1, 0] == 0 and not grad_query[1, 0].any()
    seen = support[0, [0, 1, 2, 4]]
    args = (query, labels, support, of_support, "dot", 1.0, False)
    with emulator.capturing():
        _, grad_query, _ = torch.ops.fastmeta.matching_loss_backward(weight, *args)
    wanted = weight[0, 1] * (query[0, 1] @ seen.mT).softmax(0) @ seen
    torch.testing.assert_close(grad_query[0, 1], wanted)


def test_while_capturing_an_invalid_label_of_a_support_is_seen():
    make = CaseFactory(torch.float32)
    query, support = make.randn(2, 3, 4), make.randn(2, 5, 4)
    of_support = torch.tensor([[0, 0, 0, 0, 0], [0, 0, -5, 0, 0]])
    args = (query, torch.zeros(2, 3, dtype=torch.int64), support, of_support, "dot", 1.0, False)
    with emulator.capturing():
        loss, grad_query, _ = torch.ops.fastmeta.matching_loss_backward(torch.ones(2, 3), *args)
    assert loss[0].isfinite().all() and loss[1].isnan().all()
    assert grad_query[0].isfinite().all() and grad_query[1].isnan().all()


def huge_inner_update() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows 2^30 numbers apart."""
    base = torch.empty(2**31 + 8, dtype=torch.bfloat16)
    params = base.as_strided((3, 8), (2**30, 1))
    params.copy_(torch.arange(24).view(3, 8))
    return fm.inner_update(params, params, 0.5)[-1], params[-1] / 2


def huge_update_backward() -> tuple[torch.Tensor, torch.Tensor]:
    base = torch.empty(2**31 + 8, dtype=torch.bfloat16)
    upstream = base.as_strided((3, 8), (2**30, 1))
    upstream.copy_(torch.arange(24).view(3, 8))
    lr = torch.full((1, 1), 0.5)
    grads, _ = torch.ops.fastmeta.inner_update_backward(upstream, upstream, lr)
    return grads[-1], -upstream[-1] / 2


def huge_output() -> tuple[torch.Tensor, torch.Tensor]:
    params = torch.ones(1, 2**16, dtype=torch.bfloat16).expand(2**15 + 1, -1)
    with emulator.only_blocks(-1, 1):
        return fm.inner_update(params, params, 0.5)[-1, -8:], params[-1, -8:] / 2


def huge_prototypes() -> tuple[torch.Tensor, torch.Tensor]:
    tasks, features = 2**25 + 1, 64
    x = torch.empty(tasks, 1, features, dtype=torch.bfloat16)
    x[-1] = torch.arange(features)
    labels = torch.zeros(1, 1, dtype=torch.int64).expand(tasks, 1)
    with emulator.only_blocks(-1, 1):
        return fm.prototypes(x, labels, 1)[-1, 0], x[-1, 0]


def huge_prototypes_backward() -> tuple[torch.Tensor, torch.Tensor]:
    tasks, features = 2**25 + 1, 64
    upstream = torch.empty(tasks, 1, features, dtype=torch.bfloat16)
    upstream[-1] = torch.arange(features)
    labels = torch.zeros(tasks, 1, dtype=torch.int64)
    with emulator.only_blocks(-2, 2):
        return torch.ops.fastmeta.prototypes_backward(upstream, labels)[-1, 0], upstream[-1, 0]


def huge_distance() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.empty(1, 2**25 + 40, 64, dtype=torch.bfloat16)
    x[0, -16:] = torch.arange(16).unsqueeze(1)
    y = torch.zeros(1, 2, 64, dtype=torch.bfloat16)
    with emulator.only_blocks(-1, 1):
        distance = fm.pairwise_distance(x, y)
    return distance[0, -5:, 1], 64 * torch.arange(11, 16).square().to(x.dtype)


def huge_loss() -> tuple[torch.Tensor, torch.Tensor]:
    query = torch.empty(1, 2**25 + 40, 64, dtype=torch.bfloat16)
    query[0, -16:] = 0.25
    prototypes = torch.zeros(1, 2, 64, dtype=torch.bfloat16)
    labels = torch.zeros(1, 1, dtype=torch.int64).expand(1, query.shape[1])
    with emulator.only_blocks(-1, 1):
        raw = torch.ops.fastmeta.prototype_loss(query, labels, prototypes, "sqeuclidean", 1.0)
    return raw[0, -5:], torch.full((5,), 2.0).log()


HUGE = [
    huge_inner_update,
    huge_update_backward,
    huge_output,
    huge_prototypes,
    huge_prototypes_backward,
    huge_distance,
    huge_loss,
]


@pytest.mark.parametrize("result", HUGE)
def test_indices_past_2_to_the_31(result: Callable[[], tuple[torch.Tensor, torch.Tensor]]):
    """The last block alone of launches on tensors of 2^31 numbers, next to no page of them real."""
    with no_fill(), emulator.capturing():
        actual, expected = result()
    assert torch.equal(actual, expected)
