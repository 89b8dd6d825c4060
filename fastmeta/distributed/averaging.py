"""Shares of the tasks for each rank, and means over ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastmeta.data import Episode
from fastmeta.distributed.process_group import rank, world_size


def task_slice(tasks: int) -> slice:
    """This rank's share of ``tasks`` tasks; the first ranks get one more if it is not even.

    Raises:
        ValueError: fewer tasks than ranks.

    Example:
        >>> from fastmeta.distributed import task_slice
        >>> task_slice(16)
        slice(0, 16, None)
    """
    size = world_size()
    if tasks < size:
        raise ValueError(f"tasks: expected at least one for each of {size} processes, got {tasks}")
    each, remainder = divmod(tasks, size)
    begin = rank() * each + min(rank(), remainder)
    return slice(begin, begin + each + (rank() < remainder))


def task_weight(tasks: int) -> float:
    """The weight of this rank's mean loss, so that the mean over ranks is the mean over tasks.

    It is 1 if ``tasks`` tasks split evenly; ranks with more tasks than others weigh more.

    Raises:
        ValueError: fewer tasks than ranks.

    Example:
        >>> from fastmeta.distributed import task_weight
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
        >>> from fastmeta.distributed import split_tasks
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

    A missing gradient counts as zero if another rank has it, and every rank gets the mean. A
    parameter without a gradient on any rank keeps none. Every rank must make the call.

    Args:
        learner: a module, or parameters; frozen ones are left out. All are on one device.
        values: numbers of this rank to average in the same tensor, such as its loss; ``float32``
            unless the parameters are wider.

    Returns:
        The mean over ranks of each of ``values``.

    Raises:
        ConnectionError: another process has ended.

    Example:
        >>> import torch
        >>> from fastmeta.distributed import average_gradients
        >>> net = torch.nn.Linear(2, 1)
        >>> net(torch.ones(3, 2)).mean().backward()
        >>> average_gradients(net, [0.5])  # a single process: nothing changes
        [0.5]
    """
    if world_size() == 1:
        return list(values)
    all_parameters = learner.parameters() if isinstance(learner, nn.Module) else learner
    parameters = [p for p in all_parameters if p.requires_grad]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flags = [float(p.grad is not None) for p in parameters]
    # The sum of a parameter's flags is above 0 if any rank has its gradient.
    flat = _joined(grads, [*flags, *values])
    _all_reduce(flat)
    flat /= world_size()
    *means, tail = flat.split([*(g.numel() for g in grads), len(flags) + len(values)])
    numbers: list[float] = tail.tolist()
    for parameter, grad, mean, anywhere in zip(parameters, grads, means, numbers, strict=False):
        if anywhere:
            # A copy into the gradient keeps its strides: fused optimizers assume the parameter's.
            parameter.grad = grad.copy_(mean.view(grad.shape))
    return numbers[len(flags) :]


def average_buffers(module: nn.Module, weight: float = 1.0) -> None:
    """Replace every floating-point buffer by its mean over ranks, with one all-reduce.

    For statistics of tasks in a module, such as the moment of ``rules.PersistentAdam``. Every rank
    must make the call.

    Args:
        module: its buffers are on one device.
        weight: of this rank, as ``task_weight`` gives it.

    Raises:
        ConnectionError: another process has ended.

    Example:
        >>> import torch
        >>> from fastmeta.distributed import average_buffers
        >>> average_buffers(torch.nn.BatchNorm1d(3))  # a single process: nothing changes
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


def _joined(tensors: list[Tensor], numbers: list[float]) -> Tensor:
    """One vector of all tensors, then the numbers, in ``float32`` or wider."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    device = tensors[0].device if tensors else None
    tail = torch.tensor(numbers, dtype=dtype, device=device)
    return torch.cat([*(tensor.reshape(-1) for tensor in tensors), tail])


def _all_reduce(flat: Tensor) -> None:
    """Sum over ranks, in place."""
    try:
        dist.all_reduce(flat)
    except RuntimeError as error:
        raise ConnectionError(
            "another process of this training has ended; its own message says why"
        ) from error
