"""Fakes of torch.cuda: the CPU as a device with CUDA graphs, for fastmeta.core.cuda_graphs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastmeta.core import cuda_graphs as _graphs
from fastmeta.engines.program import engine as program
from fastmeta.engines.program import explain


class Stream:
    """A stream with a number; records which stream waits for which."""

    current: Stream
    waits: list[tuple]

    def __init__(self, device: object = None, number: int = 1) -> None:
        self.device, self.number = device, number

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and other.number == self.number

    def __hash__(self) -> int:
        return self.number

    def wait_stream(self, other: Stream) -> None:
        Stream.waits.append((self.number, "stream", other.number))

    def wait_event(self, event: Event) -> None:
        Stream.waits.append((self.number, "event", event.recorded))


class Event:
    recorded: int | None = None

    def record(self, stream: Stream) -> None:
        self.recorded = stream.number


class on:
    """Stand in for ``torch.cuda.stream``."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def __enter__(self) -> None:
        self.before, Stream.current = Stream.current, self.stream

    def __exit__(self, *_: object) -> None:
        Stream.current = self.before


class Recorder(TorchDispatchMode):
    """Records every operation and spoils its results, since a capture runs nothing on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, list[Tensor]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        results = func(*args, **(kwargs or {}))
        tensors = list(results) if isinstance(results, (tuple, list)) else [results]
        self.calls.append((func, args, kwargs or {}, tensors))
        return results


class Graph:
    """Recorded operations with their tensors: a replay reads and writes the same memory."""

    made: list[Graph]

    def __init__(self) -> None:
        self.recorder, self.replays, self.where, self.was_reset = Recorder(), 0, {}, False
        Graph.made.append(self)

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, tensors in self.recorder.calls:
            again = func(*args, **kwargs)
            again = list(again) if isinstance(again, (tuple, list)) else [again]
            for old, new in zip(tensors, again, strict=True):
                old.copy_(new)

    def pool(self) -> Graph:
        return self.where["pool"] or self

    def reset(self) -> None:
        self.was_reset = True


class capture:
    """Stand in for ``torch.cuda.graph``; a failing capture leaves its stream current too."""

    error: Exception | None = None

    def __init__(self, graph: Graph, **where: Any) -> None:
        self.graph, graph.where = graph, where

    def __enter__(self) -> None:
        Stream.current = self.graph.where["stream"]
        self.graph.recorder.__enter__()

    def __exit__(self, *error: object) -> None:
        self.graph.recorder.__exit__(*error)
        if capture.error is not None:
            raise capture.error
        for *_, tensors in self.graph.recorder.calls:
            for tensor in tensors:
                tensor.fill_(torch.nan)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make the CPU a device with CUDA graphs."""
    Stream.current, Stream.waits, Graph.made, capture.error = Stream(number=0), [], [], None
    fakes = {"Stream": Stream, "Event": Event, "CUDAGraph": Graph, "graph": capture, "stream": on}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream.current)
    monkeypatch.setattr(Tensor, "record_stream", lambda x, stream: None)
    for module in (_graphs, program, explain):
        monkeypatch.setattr(module, "DEVICE_TYPE", "cpu")
    monkeypatch.setattr(_graphs, "_FAILED", [])
    yield
    assert Stream.current.number == 0


def replays() -> list[int]:
    return [graph.replays for graph in Graph.made]
