"""The launches of many calls on a device as large as an H200, of which no block runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from benchmarks.gpu import every_kernel, kernel_list
from tests.cuda_emulation import emulator
from tests.cuda_emulation.build import BUILD
from tests.cuda_emulation.checks import no_fill
from tests.cuda_emulation.emulator import Launch


@contextmanager
def dry_run() -> Iterator[list[Launch]]:
    """The launches of the `with` block, as on an H200; their kernels do nothing."""
    with ExitStack() as stack:
        stack.enter_context(no_fill())
        stack.enter_context(emulator.only_blocks(0, 0))
        stack.enter_context(emulator.multiprocessors(kernel_list.MULTIPROCESSORS))
        stack.enter_context(emulator.long_turns())
        yield stack.enter_context(emulator.launches())


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
