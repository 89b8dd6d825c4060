"""CUDA graphs of functions of tensors: what is captured, when, and whose memory results have."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastmeta.core import cuda_graphs as _graphs
from fastmeta.core.cuda_graphs import CALLS, KEPT, Captured, Graphs
from tests.helpers.fake_graphs import Graph, Stream, capture, gpu, on, replays

__all__ = ["gpu"]

pytestmark = pytest.mark.usefixtures("gpu")


def square(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x * x, x + y


def pair(seed: int, size: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator), torch.randn(size, generator=generator)


def unchecked(*inputs: Tensor) -> None:
    """Nothing is wrong with any input."""


def run(graphs: Graphs, seed: int, size: int = 3, key=None, check=unchecked, at_once=False) -> None:
    """A call, which gives what the function itself gives."""
    inputs = pair(seed, size)
    results = graphs.run(key, square, inputs, check, at_once)
    for result, expected in zip(results, square(*inputs), strict=True):
        assert torch.equal(result, expected)


def test_inputs_are_copied_in_and_results_belong_to_the_caller():
    captured = Captured(square, pair(0), Stream())
    first = captured(pair(1))
    before = [result.clone() for result in first]
    second = captured(pair(2))
    assert all(map(torch.equal, first, square(*pair(1))))
    assert all(map(torch.equal, second, square(*pair(2))))
    assert all(map(torch.equal, first, before))


def test_the_inputs_of_the_capture_may_change_later():
    inputs = pair(0)
    captured = Captured(square, inputs, Stream())
    inputs[0].zero_()
    assert torch.equal(captured(pair(1))[0], pair(1)[0] ** 2)
    assert not inputs[0].any()


def test_the_function_runs_once_before_it_is_captured_and_on_dense_copies():
    seen: list[tuple[int, bool, bool]] = []

    def function(x: Tensor) -> tuple[Tensor]:
        capturing = torch._C._len_torch_dispatch_stack() > 0
        seen.append((Stream.current.number, capturing, x.is_contiguous()))
        return (x + 1,)

    Captured(function, [torch.ones(3, 4).T], Stream(number=5))
    assert seen == [(5, False, True), (5, True, True)]


def test_expanded_inputs_and_those_that_require_gradients():
    x = torch.randn(1, 3).expand(4, 3)
    captured = Captured(square, (x, x), Stream())
    leaf = torch.randn(4, 3, requires_grad=True)
    results = captured((leaf, leaf.detach().T.contiguous().T))
    assert torch.equal(results[0], leaf.detach() ** 2)
    assert not any(result.requires_grad for result in results)


def test_inference_mode_and_ordinary_calls_share_a_graph():
    for mode in (True, False):
        with torch.inference_mode(mode):
            captured = Captured(square, pair(0), Stream())
        with torch.inference_mode(not mode):
            assert torch.equal(captured(pair(1))[0], pair(1)[0] ** 2)


def test_a_capture_waits_for_the_callers_stream_and_is_of_this_thread_alone():
    Captured(square, pair(0), Stream(number=5), pool="pool")
    assert Stream.waits == [(5, "stream", 0)]
    (graph,) = Graph.made
    assert graph.where["capture_error_mode"] == "thread_local"
    assert graph.where["stream"].number == 5 and graph.where["pool"] == "pool"


def test_the_third_call_in_a_row_is_captured():
    graphs = Graphs()
    for seed in range(5):
        run(graphs, seed)
        assert len(graphs) == (seed >= CALLS - 1)
    assert replays() == [3]


def test_other_kinds_of_calls_between_them_are_none_in_a_row():
    graphs = Graphs()
    for seed in range(6):
        run(graphs, seed, size=3 + seed % 2)
        run(graphs, seed, key="other")
    assert not Graph.made


def test_a_kind_is_shapes_dtypes_the_key_and_the_precision(monkeypatch):
    graphs = Graphs()
    for _ in range(CALLS):
        run(graphs, 0)
    run(graphs, 0, size=4)
    run(graphs, 0, key="other")
    graphs.run(None, square, [x.double() for x in pair(0)], unchecked)
    assert replays() == [1]
    run(graphs, 0)
    assert replays() == [2]
    for setting in (torch.backends.cudnn, torch.backends.cuda.matmul):
        before = setting.allow_tf32
        setting.allow_tf32 = not before
        run(graphs, 0)
        setting.allow_tf32 = before
        assert replays() == [2]


def test_what_is_captured_stays_while_other_kinds_come():
    graphs = Graphs()
    for _ in range(CALLS):
        run(graphs, 0)
    for seed in range(3):
        run(graphs, seed, key=seed)
        run(graphs, seed)
    assert replays() == [4]


def test_graphs_of_the_kinds_that_were_used_last_are_kept():
    graphs = Graphs()
    for key in range(KEPT):
        run(graphs, 0, key=key, at_once=True)
    run(graphs, 1, key=0)
    run(graphs, 0, key="new", at_once=True)
    assert len(graphs) == KEPT
    assert replays() == [2, *[1] * KEPT]
    for key in (0, 2, 3, "new"):
        run(graphs, 2, key=key)
    run(graphs, 2, key=1)  # whose graph had to go
    assert replays() == [3, 1, 2, 2, 2]


def test_graphs_share_memory_as_long_as_there_is_one():
    graphs = Graphs()
    run(graphs, 0, key=0, at_once=True)
    run(graphs, 0, key=1, at_once=True)
    graphs.clear()
    assert len(graphs) == 0
    run(graphs, 0, key=1, at_once=True)
    first, second, third = (graph.where["pool"] for graph in Graph.made)
    assert (first, second, third) == (None, Graph.made[0], None)


def test_a_replay_on_another_stream_waits_for_the_one_before():
    graphs = Graphs()
    run(graphs, 0, at_once=True)
    run(graphs, 0, key="other", at_once=True)
    Stream.waits.clear()
    with on(Stream(number=7)):
        run(graphs, 1)
    run(graphs, 2, key="other")
    assert Stream.waits == [(7, "event", 0), (0, "event", 7)]


def test_inputs_are_kept_for_every_stream_that_reads_them(monkeypatch):
    seen: list[int] = []
    monkeypatch.setattr(Tensor, "record_stream", lambda x, stream: seen.append(stream.number))
    captured = Captured(square, pair(0), Stream())
    for _ in range(2):
        captured(pair(1))
        with on(Stream(number=7)):
            captured(pair(2))
    assert seen == [0, 0, 7, 7]


def test_the_check_comes_before_each_replay():
    def check(x: Tensor, y: Tensor) -> None:
        if x[0] > 100:
            raise ValueError("too large")

    graphs = Graphs()
    run(graphs, 0, check=check, at_once=True)
    wrong = [torch.full((3,), 1000.0)] * 2
    with pytest.raises(ValueError, match="too large"):
        graphs.run(None, square, wrong, check)
    assert replays() == [1]
    run(graphs, 1, check=check)
    assert replays() == [2]


def test_without_a_graph_where_the_caller_captures_one(monkeypatch):
    graphs = Graphs()
    run(graphs, 0, at_once=True)
    monkeypatch.setattr(_graphs, "is_being_captured", lambda x: True)
    run(graphs, 1)
    run(graphs, 1, key="other", at_once=True)
    assert replays() == [1]


def test_without_a_graph_under_transforms_and_modes():
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.name())
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    graphs = Graphs()
    run(graphs, 0, at_once=True)
    with Seen():
        graphs.run(None, square, pair(1), unchecked)
    assert "aten::mul.Tensor" in names
    x, y = torch.randn(2, 3), torch.randn(3)
    mapped = torch.vmap(lambda row: graphs.run(None, square, (row, y), unchecked)[0])(x)
    assert torch.equal(mapped, x * x)
    assert replays() == [1]


def test_what_cannot_be_captured_is_called_and_not_captured_again():
    graphs = Graphs()
    capture.error = RuntimeError("operation not permitted\nwhen stream is capturing")
    for seed in range(5):
        run(graphs, seed)
    assert graphs.refusals() == ["operation not permitted"] and len(graphs) == 0
    (graph,) = Graph.made
    assert graph.was_reset and len(_graphs._FAILED) == 1
    with pytest.raises(
        RuntimeError, match=r"cuda_graph=True: .* captured: operation not permitted"
    ):
        run(graphs, 0, at_once=True)
    capture.error = None
    run(graphs, 0, key="other", at_once=True)
    assert len(graphs) == 1


def test_an_error_of_the_function_is_the_callers():
    def function(x: Tensor) -> tuple[Tensor]:
        raise ValueError("wrong")

    graphs = Graphs()
    for _ in range(CALLS + 1):
        with pytest.raises(ValueError, match="wrong"):
            graphs.run(None, function, pair(0)[:1], unchecked)
    assert graphs.refusals() == []
