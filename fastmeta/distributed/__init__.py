"""Several processes train one learner: each has its share of the tasks, one all-reduce joins them.

What a rank does in an outer step::

    loss, logits = learner.meta_loss(*fm.distributed.split_tasks(episode))
    (fm.distributed.task_weight(tasks) * loss).backward()
    fm.distributed.average_gradients(learner)
    optimizer.step()

Without a process group there is one rank with all tasks, and the same lines run as they stand.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastmeta.data import Episode
from fastmeta.distributed.sync_batch_norm import SyncBatchNorm, share_batch_statistics

__all__ = [
    "SyncBatchNorm",
    "average_buffers",
    "average_gradients",
    "process_group",
    "rank",
    "share_batch_statistics",
    "split_tasks",
    "task_slice",
    "task_weight",
    "world_size",
]

SharedBatchNorm = SyncBatchNorm  # its earlier name

Value = TypeVar("Value")

_LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def rank() -> int:
    """This process's number in the default process group; 0 where there is none."""
    return dist.get_rank() if _in_group() else 0


def world_size() -> int:
    """The number of processes in the default process group; 1 where there is none."""
    return dist.get_world_size() if _in_group() else 1


@contextmanager
def process_group() -> Iterator[None]:
    """The default process group of torchrun's processes, inside a ``with`` block.

    Gloo carries tensors of the CPU, NCCL those of GPUs. Nothing happens where a group is there
    already, or where no launcher has set ``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR`` and
    ``MASTER_PORT``.

    Example:
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
    # The agent's store outlives a restart, and so do the addresses of killed processes in it. On
    # several nodes, which count restarts each for itself, they are the launcher's to keep apart.
    size, port = int(os.environ["WORLD_SIZE"]), int(os.environ["MASTER_PORT"])
    # PyTorch documents both stores here, and its type hints do not have them.
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
    """What all processes and restarts of one torchrun share; ``""`` where it has no name."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return "" if name == "none" else name


def select_device(device: str) -> None:
    """Make ``"cuda"`` the GPU of this process's ``LOCAL_RANK``.

    Raises:
        ValueError: a GPU by its number, which all processes would share.
    """
    if world_size() == 1 or torch.device(device).type != "cuda":
        return
    if torch.device(device).index is not None:
        raise ValueError(
            f"device: expected 'cuda' for {world_size()} processes, which take a GPU each, "
            f"got {device!r}"
        )
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))


def task_slice(tasks: int) -> slice:
    """Which of ``tasks`` tasks are this rank's: as even as can be, the first ranks have one more.

    Raises:
        ValueError: fewer tasks than ranks.

    Example:
        >>> task_slice(16)
        slice(0, 16, None)
    """
    size = world_size()
    if tasks < size:
        raise ValueError(f"tasks: expected at least one for each of {size} processes, got {tasks}")
    each, more = divmod(tasks, size)
    begin = rank() * each + min(rank(), more)
    return slice(begin, begin + each + (rank() < more))


def task_weight(tasks: int) -> float:
    """What this rank's loss is worth among those of all ranks, which are averaged.

    It is 1 where ``tasks`` tasks split evenly: ranks with more tasks than others count for more, so
    that the mean over ranks of ``weight * mean over their tasks`` is the mean over all tasks.

    Raises:
        ValueError: fewer tasks than ranks.

    Example:
        >>> task_weight(16)
        1.0
    """
    mine = task_slice(tasks)
    return float(world_size() * (mine.stop - mine.start) / tasks)


def split_tasks(episode: Episode) -> Episode:
    """This rank's tasks of an episode, by ``task_slice``; the tensors are views.

    Raises:
        ValueError: fewer tasks than ranks.

    Example:
        >>> import fastmeta as fm
        >>> episodes = fm.data.Episodes(fm.data.Sinusoid(), 1, 10, 10, tasks=4)
        >>> split_tasks(episodes[0]).support_x.shape
        torch.Size([4, 10, 1])
    """
    if world_size() == 1:
        return episode
    mine = task_slice(len(episode.support_x))
    return Episode(*(tensor[mine] for tensor in episode))


def average_gradients(
    learner: nn.Module | Iterable[Tensor], values: Sequence[float] = ()
) -> list[float]:
    """Replace every gradient by its mean over ranks, with one all-reduce of one flat tensor.

    A parameter that has a gradient on some ranks counts as zero on the others, and gets the mean on
    all of them; one that has none anywhere still has none. Every rank must make the call.

    Args:
        learner: a module, or parameters; frozen ones are left out. All are on one device.
        values: numbers of this rank that go along in the same tensor, such as its loss; ``float32``
            unless the parameters are wider.

    Returns:
        The mean over ranks of each of ``values``.

    Raises:
        ConnectionError: another process has ended.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(2, 1)
        >>> net(torch.ones(3, 2)).mean().backward()
        >>> average_gradients(net, [0.5])  # one process alone: all stays as it is
        [0.5]
    """
    if world_size() == 1:
        return list(values)
    everything = learner.parameters() if isinstance(learner, nn.Module) else learner
    parameters = [p for p in everything if p.requires_grad]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flags = [float(p.grad is not None) for p in parameters]
    flat = _joined(grads, [*flags, *values])
    _all_reduce(flat)
    flat /= world_size()
    *means, tail = flat.split([*(g.numel() for g in grads), len(flags) + len(values)])
    numbers: list[float] = tail.tolist()
    for parameter, grad, mean, anywhere in zip(parameters, grads, means, numbers, strict=False):
        if anywhere:
            # The gradient keeps its strides, which fused optimizers take to be the parameter's.
            parameter.grad = grad.copy_(mean.view(grad.shape))
    return numbers[len(flags) :]


def average_buffers(module: nn.Module, weight: float = 1.0) -> None:
    """Replace every floating-point buffer by its mean over ranks, with one all-reduce.

    For what a module remembers of its tasks, such as the moment of ``rules.PersistentAdam``. Every
    rank must make the call.

    Args:
        module: its buffers are on one device.
        weight: of this rank, as ``task_weight`` gives it.

    Raises:
        ConnectionError: another process has ended.

    Example:
        >>> import torch
        >>> average_buffers(torch.nn.BatchNorm1d(3))  # one process alone: all stays as it is
    """
    if world_size() == 1:
        return
    buffers = [b for b in module.buffers() if b.is_floating_point()]
    if not buffers:
        return
    flat = weight / world_size() * _joined(buffers, [])
    _all_reduce(flat)
    for buffer, mean in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(mean.view(buffer.shape))


def on_rank_zero(make: Callable[[], Value]) -> Value:
    """``make()`` on rank 0, and its result or its exception on every rank."""
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


def _joined(tensors: list[Tensor], numbers: list[float]) -> Tensor:
    """One vector of all tensors and then the numbers, in ``float32`` or wider."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    device = tensors[0].device if tensors else None
    tail = torch.tensor(numbers, dtype=dtype, device=device)
    return torch.cat([*(tensor.reshape(-1) for tensor in tensors), tail])


def _all_reduce(flat: Tensor) -> None:
    try:
        dist.all_reduce(flat)
    except RuntimeError as error:
        raise ConnectionError(
            "another process of this training has ended; its own message says why"
        ) from error
