"""The default process group: launch, ranks, devices, work of rank 0."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist

Value = TypeVar("Value")

_LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def rank() -> int:
    """This process's number in the default process group; 0 without a group."""
    return dist.get_rank() if _in_group() else 0


def world_size() -> int:
    """The number of processes in the default process group; 1 without a group."""
    return dist.get_world_size() if _in_group() else 1


@contextmanager
def process_group() -> Iterator[None]:
    """Create the default process group of torchrun's processes, for a ``with`` block.

    Gloo carries tensors of the CPU, NCCL tensors of GPUs. Nothing happens if there is a group
    already, or if no launcher has set ``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR`` and
    ``MASTER_PORT``.

    Example:
        >>> from fastmeta.distributed import process_group, rank, world_size
        >>> with process_group():
        ...     rank(), world_size()
        (0, 1)
    """
    if not dist.is_available() or _in_group() or not launched():
        yield
        return
    _join()
    try:
        yield
    finally:
        dist.destroy_process_group()


def _join() -> None:
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not shared or os.environ.get("GROUP_WORLD_SIZE") != "1":
        dist.init_process_group()
        return
    # The agent's store outlives a restart, and so do the addresses of killed processes in it: each
    # restart takes a prefix of its own. Several nodes count restarts separately, and the launcher
    # must keep them apart.
    size, port = int(os.environ["WORLD_SIZE"]), int(os.environ["MASTER_PORT"])
    # PyTorch documents both stores, but its type hints lack them.
    store = dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"], port, size, is_master=False
    )
    attempt = f"fastmeta/{os.environ['TORCHELASTIC_RESTART_COUNT']}"
    own = dist.PrefixStore(attempt, store)  # type: ignore[attr-defined]
    dist.init_process_group(store=own, rank=int(os.environ["RANK"]), world_size=size)


def launched() -> bool:
    """Whether torchrun, or another launcher with its variables, started this process."""
    return all(name in os.environ for name in _LAUNCHER)


def launch_id() -> str:
    """The name that all processes and restarts of one torchrun share; ``""`` if it has none."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return "" if name == "none" else name


def select_device(device: str) -> None:
    """Make ``"cuda"`` the GPU of this process's ``LOCAL_RANK``.

    Raises:
        ValueError: a GPU with a number, which all processes would share.
    """
    if world_size() == 1 or torch.device(device).type != "cuda":
        return
    if torch.device(device).index is not None:
        raise ValueError(
            f"device: expected 'cuda' for {world_size()} processes with a GPU each, got {device!r}"
        )
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))


def on_rank_zero(make: Callable[[], Value]) -> Value:
    """Call ``make()`` on rank 0, and return its result or raise its exception on every rank."""
    if world_size() == 1:
        return make()
    outcome: list[Value | Exception | None] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = make()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if isinstance(outcome[1], Exception):
        raise outcome[1]
    return outcome[0]  # type: ignore[return-value]


def _in_group() -> bool:
    return dist.is_available() and dist.is_initialized()
