"""What the emulator computes, and that each of its detectors finds the bug it is there for."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys

import pytest
import torch

import fastmeta as fm
from tests.cuda_emulation import emulator
from tests.cuda_emulation.build import BUILD

THREADS, BLOCKS, WARP = 64, 2, 32
LAUNCH_FAILURE = 719

# What the report says of each bug, with the line that it points at where it points at one.
BUGS = {
    "barrier_removed": r"shared memory .*tile, which (thread \d+|a thread of another warp) "
    r"(reads|writes) with no barrier between\n(.*\n)*.*barrier_removed.*kernels.cu:\d+",
    "second_barrier_removed": r"with no barrier between",
    "warp_barrier_removed": r"which thread \d+ (reads|writes) with no barrier between",
    "initialisation_skipped": r"thread 6 of block \d reads 4 bytes at byte 28 of the 256 bytes of "
    r"shared memory .*tile, which no thread has written",
    "past_end_of_shared": r"thread 63 of block \d reads 4 bytes at byte 256 of the 256 bytes of "
    r"shared memory .*tile, which is out of bounds\n.*read_next",
    "past_end_of_dynamic_shared": r"byte 256 of the 256 bytes of shared memory \(dynamic\), "
    r"which is out of bounds",
    "read_past_end_of_global": r"thread 63 of block 1 reads 4 bytes of global memory that belong "
    r"to no allocation\n.*read_past_end_of_global.*kernels.cu:\d+",
    "write_past_end_of_global": r"thread 63 of block 1 writes 4 bytes of global memory",
    "two_writers": r"writes 4 bytes .*first, which thread (0|32) writes with no barrier between",
    "sum_not_atomic": r"count, which thread \d+ (reads|writes) with no barrier between",
    "barrier_after_exit": r"waits at __syncthreads of .*kernels.cu:\d+ for thread 63, "
    r"which has exited",
    "barriers_in_branches": r"waits at __syncthreads of .*kernels.cu:\d+ for thread \d+, "
    r"which waits at __syncthreads of .*kernels.cu:\d+",
    "mask_names_exited_lane": r"waits at __shfl_sync of .* for thread 63, which has exited",
    "mask_without_own_lane": r"thread (0|32) of block \d calls __shfl_sync with a mask that does "
    r"not name its own lane",
    "source_outside_mask": r"thread \d+ of block \d reads by __shfl_sync lane (16|0), "
    r"which its mask does not name",
    "lanes_apart": r"waits at __(shfl|ballot)_sync of .*, which waits at __(shfl|ballot)_sync",
}
ABORTING = {
    "index_past_end_of_array": r"index 64 out of bounds for type 'float \[64\]'",
    "misaligned": r"misaligned address",
}

each_order = pytest.mark.parametrize("order", emulator.ORDERS)


@pytest.fixture(scope="module")
def kernels() -> ctypes.CDLL:
    return emulator.load_kernels(BUILD / "kernels.so")


@pytest.fixture(autouse=True)
def natural_order_afterwards(request: pytest.FixtureRequest):
    yield
    emulator.set_order("natural")


def run(kernels: ctypes.CDLL, name: str, bug: bool, columns: int = 1) -> tuple[int, torch.Tensor]:
    """The error of a launch, and what it wrote."""
    numbers = torch.arange(BLOCKS * THREADS, dtype=torch.float32)
    out = torch.empty(BLOCKS * THREADS * columns)
    pointers = (ctypes.c_void_p(x.data_ptr()) for x in (numbers, out))
    return kernels.run_kernel(name.encode(), ctypes.c_bool(bug), *pointers), out


def rotated() -> torch.Tensor:
    numbers = torch.arange(BLOCKS * THREADS, dtype=torch.float32)
    return numbers.view(-1, WARP).roll(-1, 1).flatten()


@each_order
@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(kernels, bug, order):
    emulator.set_order(order)
    error, _ = run(kernels, bug, True)
    assert error == LAUNCH_FAILURE
    assert re.search(BUGS[bug], emulator.report()), emulator.report()


@each_order
@pytest.mark.parametrize("bug", [*BUGS, *ABORTING])
def test_nothing_is_found_without_the_bug(kernels, bug, order):
    emulator.set_order(order)
    run(kernels, "barrier_removed", True)  # an error leaves nothing behind
    error, out = run(kernels, bug, False)
    assert error == 0
    assert torch.equal(out, rotated())


@pytest.mark.parametrize("bug", ABORTING)
def test_undefined_behaviour_stops_the_process(bug):
    code = (
        "from tests.cuda_emulation.test_emulator import *\n"
        f"run(emulator.load_kernels(BUILD / 'kernels.so'), {bug!r}, True)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode != 0
    assert re.search(ABORTING[bug], process.stderr), process.stderr


def within(lane: int, source: int, width: int = WARP) -> int:
    """Lane `source` where it lies in the same part of `width` lanes, else the lane itself."""
    return source if source // width == lane // width and 0 <= source < WARP else lane


@each_order
def test_warp_operations(kernels, order):
    emulator.set_order(order)
    error, out = run(kernels, "warp_operations", False, columns=16)
    expected = [
        [
            *(within(lane, lane - 3), within(lane, lane + 3), lane ^ 5),
            *(within(lane, lane - 3, 8), within(lane, lane + 3, 8), lane // 8 * 8 + 3),
            *(11, 1, 0, 496, 31, 0, 4),
            *(31 if lane % 2 else 0, 496, 1),
        ]
        for lane in range(WARP)
    ]
    assert error == 0
    for warp in out[: THREADS * 16].view(-1, WARP, 16):
        assert warp.tolist() == expected


@each_order
def test_block_operations(kernels, order):
    emulator.set_order(order)
    error, out = run(kernels, "block_operations", False, columns=6)
    assert error == 0
    rows = out.view(BLOCKS, THREADS, 6)
    assert (rows[..., :5] == torch.tensor([10.0, 1, 0, 1, THREADS * BLOCKS])).all()
    assert (rows[:, 0, 5] == THREADS * (THREADS - 1) / 2).all()


@each_order
def test_atomics(kernels, order):
    emulator.set_order(order)
    error, out = run(kernels, "atomic_operations", False, columns=9)
    assert error == 0
    xor = 0b01111  # 64 threads: 13 times bits 0 to 3, 12 times bit 4
    total = THREADS * (THREADS - 1) // 2
    expected = torch.tensor([total, -total, 7, -5, 63, ~12, 63, xor, 3]).float()
    assert (out.view(-1, 9) == expected).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types_round_as_torch_does(dtype):
    """Every finite number, moved by a step that has more digits, through fastmeta's own kernel."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    params = every[every.isfinite()].unsqueeze(0)
    grads = params.flip(1)
    exact = params.float() - 0.3 * grads.float()
    assert torch.equal(fm.inner_update(params, grads, 0.3), exact.to(dtype))
