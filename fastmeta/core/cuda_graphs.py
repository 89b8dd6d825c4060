"""CUDA graphs of functions of tensors: captured when a call is repeated, replayed from then on.

A graph launches all kernels of a call at once, in memory at fixed addresses: inputs are copied in,
outputs are copied out. It follows PyTorch's notes on CUDA graphs,
https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs: the function runs once on a side
stream before it is captured there. Its inputs and outputs live as long as the graph.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

DEVICE_TYPE = "cuda"

CALLS = 3  # calls of a kind in a row; the last is captured

KEPT = 4  # graphs, of the kinds of calls used last

Function = Callable[..., Sequence[Tensor]]

# Graphs whose capture failed. The allocator may still ask them whether they are being captured.
_FAILED: list[torch.cuda.CUDAGraph] = []


_ALL: WeakSet[Graphs] = WeakSet()


def clear_all() -> None:
    """Drop the graphs of all learners, with their memory."""
    for graphs in list(_ALL):
        graphs.clear()


def check_option(cuda_graph: bool | str) -> None:
    """Raise ValueError unless it is "auto", True or False."""
    if not (isinstance(cuda_graph, bool) or cuda_graph == "auto"):
        raise ValueError(f"cuda_graph: expected 'auto', True or False, got {cuda_graph!r}")


class Captured:
    """A function as a CUDA graph, called with tensors like the captured ones.

    Results belong to the caller; they have no gradients.

    Args:
        function: tensors to tensors. Its launches must not depend on values, and it must not wait
            for the device while it is captured; otherwise it raises a RuntimeError.
        inputs: of the first call.
        stream: where to run and capture it, not a default stream.
        pool: memory of another graph, to share; the two are never replayed at the same time.
    """

    def __init__(
        self,
        function: Function,
        inputs: Sequence[Tensor],
        stream: torch.cuda.Stream,
        pool: Any = None,
    ) -> None:
        self._graph, self._stream = torch.cuda.CUDAGraph(), stream
        self._streams = {stream}
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        # A capture that failed leaves its stream the current one; this resets it. Outside
        # inference mode, or the inputs could be written in inference mode only.
        with torch.cuda.stream(stream), torch.inference_mode(False), torch.no_grad():
            dense = torch.contiguous_format
            self._inputs = [x.detach().clone(memory_format=dense) for x in inputs]
            function(*self._inputs)  # loads the kernels, which cannot be captured
            where = {"pool": pool, "stream": stream, "capture_error_mode": "thread_local"}
            try:
                with torch.cuda.graph(self._graph, **where):
                    self._outputs = tuple(function(*self._inputs))
            except BaseException:
                self._graph.reset()
                _FAILED.append(self._graph)
                raise

    def pool(self) -> Any:
        """The memory of the graph, for another one."""
        return self._graph.pool()

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        stream = torch.cuda.current_stream(self._stream.device)
        if stream not in self._streams:  # its work must end before the memory is reused
            self._streams.add(stream)
            for static in self._inputs:
                static.record_stream(stream)
        with torch.no_grad():
            for static, x in zip(self._inputs, inputs, strict=True):
                static.copy_(x)
            self._graph.replay()
            return [result.clone() for result in self._outputs]


class Graphs:
    """The graphs of one learner, each of one kind of call.

    A kind is a key, the shapes and dtypes of all tensors, and PyTorch's precisions. The third call
    of a kind in a row is captured; the graphs of the four kinds used last are kept. They share
    their memory, so they are replayed one after another, on any stream. All tensors are on one
    device.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, Captured | str] = OrderedDict()
        self._latest: Hashable = None
        self._in_a_row = 0
        self._stream: torch.cuda.Stream | None = None
        self._done: Any = None  # an event, once the stream exists
        self._lock = threading.Lock()
        _ALL.add(self)

    def __len__(self) -> int:
        return sum(isinstance(kept, Captured) for kept in self._kept.values())

    def refusals(self) -> list[str]:
        """Why calls could not be captured."""
        return [kept for kept in self._kept.values() if isinstance(kept, str)]

    def clear(self) -> None:
        """Drop all graphs, with their memory."""
        with self._lock:
            self._kept.clear()
            self._latest = self._stream = self._done = None

    def run(
        self,
        key: Hashable,
        function: Function,
        inputs: Sequence[Tensor],
        check: Callable[..., object],
        at_once: bool = False,
    ) -> Sequence[Tensor]:
        """``function(*inputs)``, by a graph if one is kept or due.

        No graph is used while the caller captures one, which then holds the function's kernels.
        Nor under transforms and dispatch modes, which would not see the kernels of a replay.

        Args:
            key: everything besides the inputs that the function depends on.
            function: as for ``Captured``; it checks its inputs as ``check`` does, except while it
                is captured.
            inputs: on one device, the same for all calls until ``clear``.
            check: called with the inputs before each replay; its errors are raised here.
            at_once: capture the first call of a kind, and raise a RuntimeError if that fails.
        """
        if _is_watched() or is_being_captured(inputs[0]):
            return function(*inputs)
        precisions: tuple[Any, ...]
        precisions = torch.backends.cudnn.conv, torch.backends.cuda.matmul  # type: ignore[attr-defined]
        key = (
            key,
            tuple((x.shape, x.dtype) for x in inputs),
            tuple(precision.fp32_precision for precision in precisions),
        )
        with self._lock:
            self._in_a_row = self._in_a_row + 1 if key == self._latest else 1
            self._latest = key
            if key not in self._kept and (at_once or self._in_a_row >= CALLS):
                self._kept[key] = self._capture(function, inputs)
            captured = self._kept.get(key)
            if captured is not None:
                self._kept.move_to_end(key)
            if isinstance(captured, Captured):
                check(*inputs)
                return self._replay(captured, inputs)
        if captured is not None and at_once:
            raise RuntimeError(f"cuda_graph=True: the call could not be captured: {captured}")
        return function(*inputs)

    def _capture(self, function: Function, inputs: Sequence[Tensor]) -> Captured | str:
        """The graph of a call, or why there is none."""
        while len(self._kept) >= KEPT:
            self._kept.popitem(last=False)
        if self._stream is None:
            self._stream, self._done = torch.cuda.Stream(inputs[0].device), torch.cuda.Event()
        # A pool is valid while a graph uses it.
        pools = [kept.pool() for kept in self._kept.values() if isinstance(kept, Captured)]
        try:
            return Captured(function, inputs, self._stream, pools[0] if pools else None)
        except RuntimeError as error:
            return (str(error).splitlines() or [type(error).__name__])[0]

    def _replay(self, captured: Captured, inputs: Sequence[Tensor]) -> list[Tensor]:
        stream = torch.cuda.current_stream(inputs[0].device)
        stream.wait_event(self._done)  # the last replay may have been on another stream
        try:
            return captured(inputs)
        finally:
            self._done.record(stream)


def _is_watched() -> bool:
    """Whether a transform of torch.func or a dispatch mode must see each operation."""
    return torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack() > 0


def is_being_captured(x: torch.Tensor) -> bool:
    """Whether work on `x` goes into a CUDA graph, where nothing can be read back."""
    if not x.is_cuda:
        return False
    with torch.cuda.device(x.device):
        return torch.cuda.is_current_stream_capturing()
