"""The launches of whole workloads on a device as large as an H200, of which no block runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch

from benchmarks.common.workloads import WORKLOADS
from benchmarks.gpu import every_kernel, kernel_list
from benchmarks.gpu.precision import convolutions
from benchmarks.gpu.programs import draw, meta_step
from tests.cuda_emulation import emulator
from tests.cuda_emulation.build import BUILD
from tests.cuda_emulation.checks import no_fill
from tests.cuda_emulation.emulator import Launch

# Launches of a meta-step at most.
IMAGES = {"omni_paper": 180, "omni_20w": 676, "omni_conv1": 183, "mini_conv5": 708}
# Bytes of shared memory at most of a block that has a whole task.
BLOCKS = {"sin1": 35 * 1024, "sin5": 88 * 1024}
PACK = 4  # channels that are read at once, and columns that are written at once


@contextmanager
def dry_run() -> Iterator[list[Launch]]:
    """The launches of the `with` block, as on an H200; their kernels do nothing."""
    with ExitStack() as stack:
        stack.enter_context(no_fill())
        stack.enter_context(emulator.only_blocks(0, 0))
        stack.enter_context(emulator.multiprocessors(kernel_list.MULTIPROCESSORS))
        stack.enter_context(emulator.long_turns())
        yield stack.enter_context(emulator.launches())


def launches_of(name: str) -> list[Launch]:
    """The launches of a meta-step of a workload, without checks of labels."""
    workload = WORKLOADS[name]
    inputs = draw(workload)(torch.Generator().manual_seed(0))
    with emulator.capturing(), dry_run() as launches:
        meta_step(workload.steps)(*inputs)
    return launches


def is_narrow(launch: Launch) -> bool:
    """Whether a convolution that could read or write several numbers at a time does not."""
    facts, to = launch.facts, int(re.search(r"\(MapTo\)(\d)", launch.kernel)[1])
    of_images = facts["outputs" if to == 1 else "channels"]
    reads_singly = of_images % PACK == 0 and not facts["wide"]
    # Weights that are not in parts are scattered, whatever their alignment.
    writes_rows = (to != 2 or facts["splits"] > 1) and facts["n"] % PACK == 0
    return reads_singly or (writes_rows and not facts["aligned_target"])


@pytest.mark.parametrize("tf32", [False, True], ids=["ieee", "tf32"])
@pytest.mark.parametrize("name", IMAGES)
def test_every_convolution_of_a_workload_reads_and_writes_wide(name, tf32):
    with convolutions(tf32):
        launches = launches_of(name)
    found = [launch for launch in launches if launch.kernel.startswith("convolution_kernel")]
    maps = {re.search(r"\(MapTo\)(\d)", launch.kernel)[1] for launch in found}
    assert maps == {"0", "1", "2"} and all(("TensorSums" in x.kernel) == tf32 for x in found)
    assert [f"{x.kernel} {x.facts}" for x in found if is_narrow(x)] == []
    assert len(launches) <= IMAGES[name]


@pytest.mark.parametrize("name", BLOCKS)
def test_a_meta_step_of_a_small_network_is_one_block_a_task(name):
    launches = launches_of(name)
    kernels = [launch.kernel.partition("<")[0] for launch in launches]
    assert kernels == ["block_kernel", "sum_over_tasks_kernel"]
    assert launches[0].blocks == WORKLOADS[name].tasks
    assert launches[0].shared_bytes <= BLOCKS[name]


def test_the_list_of_kernels_is_what_the_check_of_every_kernel_launches():
    """`make gpu` compares the list with what ran on the GPU."""
    with dry_run() as launches:
        for inputs in every_kernel.ALL_INPUTS:
            with inputs.precision():
                for op, arguments in inputs.calls("cpu"):
                    getattr(torch.ops.fastmeta, op)(*arguments)
    text = kernel_list.as_text({launch.kernel for launch in launches})
    made = BUILD / kernel_list.PATH.name
    made.write_text(text)
    assert text == kernel_list.PATH.read_text(), f"copy {made} to {kernel_list.PATH}"
