"""Memory that fastmeta keeps between calls, and how much a call may take."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastmeta.core import cuda_graphs
from fastmeta.core.backend import _C


def release_memory() -> int:
    """Give back the memory that fastmeta keeps for its next calls; they take it again.

    On the CPU, each thread that has run a kernel keeps its largest workspace, up to the MiB that
    the environment variable ``FASTMETA_WORKSPACE_MB`` allows (1024 unless it is set; 0: none), and
    the functional engine keeps as many MiB of its tensors' memory for all threads together.
    On CUDA, learners keep up to four CUDA graphs each; their memory returns to PyTorch's cache,
    which ``torch.cuda.empty_cache()`` gives back.

    Returns:
        Bytes of host memory given back.

    Example:
        >>> import torch
        >>> import fastmeta as fm
        >>> learner = fm.MAML(fm.models.MLP([1, 40, 1]), loss=torch.nn.functional.mse_loss)
        >>> x = torch.randn(25, 10, 1)
        >>> loss = learner.meta_loss(x, x, x, x)[0]
        >>> fm.release_memory() > 0, fm.release_memory()
        (True, 0)
    """
    cuda_graphs.clear_all()
    return 0 if _C is None else _C.release_memory()


@contextmanager
def kept_pages() -> Iterator[None]:
    """Context in which large CPU tensors take memory that earlier ones of such contexts gave back.

    Pages new to the process take longer than the arithmetic on them. The memory is kept up to the
    bound of ``release_memory``, which gives it back. Contexts nest, and are of one thread.
    """
    if _C is None:
        yield
        return
    _C.begin_keeping_pages()
    try:
        yield
    finally:
        _C.end_keeping_pages()


def memory_limit(device: torch.device) -> int:
    """Bytes that the activations of tasks that run together may take on a device.

    The environment variable ``FASTMETA_MEMORY_LIMIT`` gives them in MiB; without it, a quarter of
    what is free now.

    Raises:
        ValueError: the variable is no number of at least 0.
    """
    asked = os.environ.get("FASTMETA_MEMORY_LIMIT", "")
    if not asked:
        return _free_memory(device) // 4
    if not asked.isdecimal():
        raise ValueError(f"FASTMETA_MEMORY_LIMIT: expected a number of MiB, got {asked!r}")
    return int(asked) << 20


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            found = dict(line.split(":") for line in lines)
        return int(found["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError):  # no Linux: all of the memory that the system has
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
