"""Bodies in DistributedDataParallel: two processes share the tasks of a ProtoNet and of an ANIL.

    python examples/ddp_body.py

DDP averages the gradients of the module that it wraps, and a learner takes it as any body.
``fm.distributed.average_gradients`` averages the rest, such as ANIL's head. The gradients equal the
result of one process with all tasks, in float64 to the last digits.
"""

from __future__ import annotations

import gc
import tempfile
import warnings
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

import fastmeta as fm

PROCESSES, TASKS = 2, 6


def learners(wrap: Callable[[nn.Module], nn.Module]) -> dict[str, fm.ProtoNet | fm.ANIL]:
    torch.manual_seed(0)
    encoder, body = (fm.models.Conv4(hidden=8, ways=None) for _ in range(2))
    head = nn.Linear(body.embedding_size, 5)
    # The norms of a ProtoNet see all tasks at once, and so they must here; ANIL's see one task.
    encoder = fm.distributed.share_batch_statistics(encoder)
    return {
        "ProtoNet": fm.ProtoNet(wrap(encoder.double())),
        "ANIL": fm.ANIL(wrap(body.double()), head.double(), lr=0.1, steps=5),
    }


def meta_batch() -> fm.data.Episode:
    source = fm.data.Glyphs("validation")
    episode = fm.data.Episodes(source, ways=5, shots=1, queries=5, tasks=TASKS)[0]
    support_x, query_x = episode.support_x.double(), episode.query_x.double()
    return episode._replace(support_x=support_x, query_x=query_x)


def meta_gradient(learner: fm.ProtoNet | fm.ANIL, episode: fm.data.Episode) -> Tensor:
    """One outer step's gradient, in one process or in several."""
    loss, _ = learner.meta_loss(*fm.distributed.split_tasks(episode))
    (fm.distributed.task_weight(TASKS) * loss).backward()
    if isinstance(learner, fm.ANIL):
        fm.distributed.average_gradients(learner.head)
    return torch.cat([p.grad.flatten() for p in learner.parameters()])


def compare(rank: int, expected: dict[str, Tensor]) -> None:
    # Buffers are the same on all ranks already: shared statistics, or none in use. The option's
    # newer name is not known to every version of PyTorch.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")
    wrap = partial(DistributedDataParallel, broadcast_buffers=False)
    for name, learner in learners(wrap).items():
        gradient = meta_gradient(learner, meta_batch())
        difference = (gradient - expected[name]).abs().max().item()
        if rank == 0:
            largest = expected[name].abs().max().item()
            print(f"{name}: largest entry {largest:.3f}, differs by at most {difference:.1e}")
        if not difference < 1e-9:
            raise SystemExit(f"{name}: the gradient of {PROCESSES} processes differs")


def process(rank: int, store: str, expected: dict[str, Tensor]) -> None:
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=PROCESSES)
    torch.set_num_threads(1)
    compare(rank, expected)
    gc.collect()  # a DDP module that outlives the group can wait for the group's thread forever
    dist.destroy_process_group()


def main() -> None:
    print(f"The meta-gradient of {PROCESSES} processes beside the meta-gradient of one:")
    expected = {n: meta_gradient(made, meta_batch()) for n, made in learners(lambda m: m).items()}
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(process, (f"{folder}/store", expected), nprocs=PROCESSES)


if __name__ == "__main__":
    main()
