"""The emulator as Python sees it: what to run how, and what was launched."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from tests.cuda_emulation.build import BUILD
from tests.cuda_emulation.settings import ORDERS
from tools.cuda_check import readable

SLOT = 64 * 1024  # alignment of a __shared__ array, as in shared_memory.h
INVALID_VALUE = 1  # cudaErrorInvalidValue
ORDER_OF = pytest.StashKey[str]()  # the order of threads of a test, where it is given


@dataclass(frozen=True)
class Launch:
    """A kernel that ran; `stream` is its number on the device that was current, -1 if another's."""

    blocks: int
    threads: int
    shared_bytes: int
    device: int
    stream: int
    place: int  # of the kernel in `library`
    library: str
    facts: dict[str, int]  # of its arguments; see launch_facts.h

    @property
    def kernel(self) -> str:
        """Its name as `tools.cuda_check` shows it."""
        return kernels_of(self.library)[self.place]


@cache
def kernels_of(library: str) -> dict[int, str]:
    """The names of the kernels of a library, by their places in it."""
    symbols = _symbols(Path(library), ".text")
    return {place: readable(name) for place, _, name in symbols if "_kernel" in name}


@cache
def runtime() -> ctypes.CDLL:
    library = ctypes.CDLL(str(BUILD / "libemulator.so"), mode=ctypes.RTLD_GLOBAL)
    library.emulator_report.restype = ctypes.c_char_p
    library.emulator_launch_count.restype = ctypes.c_int64
    library.emulator_take_barriers.restype = ctypes.c_char_p
    library.emulator_remove_barrier.argtypes = [ctypes.c_char_p, ctypes.c_uint]
    library.emulator_run_only.argtypes = [ctypes.c_int64, ctypes.c_int64]
    library.emulator_set_order.argtypes = [ctypes.c_int, ctypes.c_uint64]
    sizes = [ctypes.c_size_t] * 3
    library.emulator_add_shared.argtypes = [ctypes.c_void_p, *sizes, ctypes.c_char_p]
    library.emulator_fail_after.argtypes = [ctypes.c_int64]
    library.emulator_launch.argtypes = [ctypes.c_int64, ctypes.POINTER(ctypes.c_int64)]
    for name in ("library", "facts"):
        text = getattr(library, f"emulator_launch_{name}")
        text.restype, text.argtypes = ctypes.c_char_p, [ctypes.c_int64]
    library.emulator_set_turns.argtypes = [ctypes.c_int64] * 2
    return library


@cache
def load_kernels(path: Path) -> ctypes.CDLL:
    """Loads a library of kernels and tells the emulator of its __shared__ arrays."""
    runtime()
    library = ctypes.CDLL(str(path))
    arrays = _symbols(path, ".bss")  # what starts as zero: __shared__ arrays, and others
    end = max((offset + size for offset, size, _ in arrays), default=0)
    end = -(-end // mmap.PAGESIZE) * mmap.PAGESIZE  # nothing else shares the last page
    for offset, size, name in arrays:
        if offset % SLOT == 0:
            runtime().emulator_add_shared(library._handle, offset, size, end, name.encode())
    return library


def _symbols(path: Path, section: str) -> list[tuple[int, int, str]]:
    """Offset, size and name of each symbol of a section of a library."""
    command = ["nm", "--defined-only", "--format=sysv", "--demangle", str(path)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    lines = [line.rsplit("|", 6) for line in output.splitlines() if line.endswith(f"|{section}")]
    return [
        (int(offset, 16), int(size, 16), name.strip())
        for name, offset, _, _, size, _, _ in lines
        if size.strip()
    ]


def set_order(order: str, seed: int = 0) -> None:
    """In which order blocks, and the threads of a block, run."""
    runtime().emulator_set_order(ORDERS.index(order), seed)


def report() -> str:
    """What the last launch that failed did wrong."""
    return runtime().emulator_report().decode()


def barriers_since_last_call() -> list[str]:
    """The barriers that threads came to, as "file:line"."""
    return runtime().emulator_take_barriers().decode().split()


@contextmanager
def launches() -> Iterator[list[Launch]]:
    """A list of the kernels that the `with` block starts, filled at its end."""
    runtime().emulator_forget_launches()
    seen: list[Launch] = []
    yield seen
    for i in range(runtime().emulator_launch_count()):
        fields = (ctypes.c_int64 * 6)()
        runtime().emulator_launch(i, fields)
        library, facts = (
            text(i).decode()
            for text in (runtime().emulator_launch_library, runtime().emulator_launch_facts)
        )
        numbers = (word.split("=") for word in facts.split())
        seen.append(Launch(*fields, library, {name: int(number) for name, number in numbers}))


# Each of these holds inside of a `with` block.


@contextmanager
def _during(name: str, values: tuple, usual: tuple) -> Iterator[None]:
    setting = getattr(runtime(), name)
    setting(*values)
    try:
        yield
    finally:
        setting(*usual)


def only_blocks(first: int, count: int) -> AbstractContextManager[None]:
    """Of every launch, `count` blocks run from `first` on; from the end where that is negative."""
    return _during("emulator_run_only", (first, count), (0, 2**62))


def without_barrier(file: str, line: int) -> AbstractContextManager[None]:
    """Threads pass the barrier there as if the source had none."""
    return _during("emulator_remove_barrier", (file.encode(), line), (b"", 0))


def failing_launch(after: int) -> AbstractContextManager[None]:
    """The launch after `after` others fails."""
    return _during("emulator_fail_after", (after,), (-1,))


def capturing() -> AbstractContextManager[None]:
    """The current stream says that it is being captured."""
    return _during("emulator_set_capturing", (True,), (False,))


def devices(current: int, of_tensors: int) -> AbstractContextManager[None]:
    """Which device is current at first, and on which one tensors are."""
    return _during("emulator_set_device", (current, of_tensors), (0, 0))


def multiprocessors(count: int) -> AbstractContextManager[None]:
    """How many a device has; 2 otherwise."""
    return _during("emulator_set_multiprocessors", (count,), (2,))


def shared_memory(bytes: int) -> AbstractContextManager[None]:
    """How much of it a block can have; 227 KiB otherwise."""
    return _during("emulator_set_shared_memory", (bytes,), (227 * 1024,))


def long_turns() -> AbstractContextManager[None]:
    """As much is done at a time as without the emulator; 16 KiB of tasks, 8192 distances otherwise.

    See FASTMETA_TASK_BYTES and FASTMETA_CHUNK.
    """
    return _during("emulator_set_turns", (4 << 30, 1 << 26), (16384, 8192))


def current_stream(device: int, stream: int) -> AbstractContextManager[None]:
    """The current stream of a device."""
    return _during("emulator_set_stream", (device, stream), (device, 0))


def leave_error(code: int) -> None:
    """Make it what the next cudaGetLastError() returns, as of somebody else's launch."""
    runtime().emulator_leave_error(code)


def take_error() -> int:
    """What cudaGetLastError() returns; 0 if there is none."""
    return runtime().emulator_take_error()


def current_device() -> int:
    return runtime().emulator_device()
