"""Timing on a CPU by its clock and on a GPU by events: contenders take turns, as in _timing."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

from fastmeta.training import timing as _timing

Call = Callable[[int], Any]  # given a running number, so that it can rotate among its inputs
Seconds = dict[str, list[float]]  # of one call, round by round


@dataclass(frozen=True)
class Spread:
    """Median and quartiles, in seconds."""

    median: float
    first_quartile: float
    third_quartile: float
    rounds: int

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(middle, low, high, len(values))

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


class Captured(Protocol):
    """Several calls captured as one; `output` is the output of the last."""

    output: Any

    def __call__(self, number: int) -> None: ...


class Timer(Protocol):
    device: torch.device
    cache_bytes: int  # of the last cache before memory

    def interleave(self, contenders: Mapping[str, Call], rounds: int, calls: int) -> Seconds:
        """Seconds a call of each, in `rounds` rounds of `calls` calls, after one to warm up."""
        ...

    def captured(self, call: Call, calls: int) -> Captured: ...


class _Repeated:
    def __init__(self, call: Call, calls: int) -> None:
        self.call, self.calls = call, calls

    def __call__(self, number: int) -> None:
        for i in range(self.calls):
            self.output = self.call(i)


class HostTimer:
    """Timer by the CPU's clock. A CPU has no graphs: "captured" calls are made one by one."""

    device = torch.device("cpu")
    cache_bytes = 1 << 20

    def interleave(self, contenders: Mapping[str, Call], rounds: int, calls: int) -> Seconds:
        repeated = {name: _Repeated(call, calls) for name, call in contenders.items()}
        captured = {name: (lambda call=call: call(0)) for name, call in repeated.items()}
        taken = _timing.interleave(captured, rounds)
        return {name: [s / calls for s in seconds] for name, seconds in taken.items()}

    def captured(self, call: Call, calls: int) -> Captured:
        return _Repeated(call, calls)


class _Graph:
    def __init__(self, call: Call, calls: int) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for i in range(3):  # what a first call sets up cannot be captured
                call(i)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for i in range(calls):
                self.output = call(i)

    def __call__(self, number: int) -> None:
        self.graph.replay()


class CudaTimer:
    """Timer by CUDA events around the calls of a round; the host's time is hidden behind them."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.cache_bytes = torch.cuda.get_device_properties(self.device).L2_cache_size

    def interleave(self, contenders: Mapping[str, Call], rounds: int, calls: int) -> Seconds:
        taken: Seconds = {name: [] for name in contenders}
        for turn in range(rounds + 1):
            for name, call in contenders.items():
                taken[name].append(self._seconds(call, turn * calls, calls) / calls)
        return {name: seconds[1:] for name, seconds in taken.items()}

    def _seconds(self, call: Call, first: int, calls: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for i in range(first, first + calls):
            call(i)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def captured(self, call: Call, calls: int) -> Captured:
        return _Graph(call, calls)
