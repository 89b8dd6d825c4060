"""Run functions on several processes at once, as ranks of one gloo group."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

# A process that has imported everything once, of which ranks are forked in a moment.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.helpers.runs", "fastmeta.distributed"])


def on_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Run ``function(*arguments)`` on every rank; returns the results, or raises the exception.

    ``function`` is defined at the top level of a module, and its result holds no tensors.
    """
    with tempfile.TemporaryDirectory() as folder:
        ends, processes = [], []
        for rank in range(world_size):
            end, other = _context.Pipe(duplex=False)
            what = f"{folder}/store", rank, world_size, other, function, arguments
            processes.append(_context.Process(target=_on_rank, args=what))
            processes[-1].start()
            other.close()
            ends.append(end)
        try:
            return [end.recv() for end in ends]
        finally:
            for process in processes:
                process.join()


def _on_rank(
    store: str,
    rank: int,
    world_size: int,
    end: Connection,
    function: Callable[..., Any],
    arguments: tuple,
) -> None:
    torch.set_num_threads(1)
    options = {"rank": rank, "world_size": world_size}
    dist.init_process_group("gloo", init_method=f"file://{store}", **options)
    # A rank that leaves before another has connected to all breaks that one's set-up.
    dist.barrier()
    try:
        end.send(function(*arguments))
    except Exception as error:
        end.send(error)
    finally:
        dist.destroy_process_group()
