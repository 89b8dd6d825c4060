"""A body sharded by FSDP, under heads that every task adapts with ``fm.linear_head``.

    python examples/fsdp_body.py

Each of two processes holds half of the body's parameters and half of the tasks. The body's
features are an ordinary tensor, and the inner loop is one differentiable op on them, so the loop is
the same for a sharded body. Losses equal a run of one process, step after step.
"""

from __future__ import annotations

import tempfile

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fastmeta as fm

PROCESSES, TASKS, OUTER_STEPS, SHOTS = 2, 8, 5, 5


def meta_loss(body: nn.Module, head: nn.Linear, episode: fm.data.Episode) -> Tensor:
    """The query loss of heads adapted to the support, as in ANIL."""
    support_x, support_y, query_x, query_y = episode
    x = torch.cat([support_x, query_x], dim=1)
    features = body(x.flatten(0, 1)).unflatten(0, x.shape[:2])
    support, query = features.split([support_x.shape[1], query_x.shape[1]], dim=1)
    weight, bias = fm.linear_head(support, support_y, head.weight, head.bias, lr=0.1, steps=5)
    logits = fm.task_linear(query, weight, bias)
    return F.cross_entropy(logits.flatten(0, 1), query_y.flatten())


def train() -> tuple[list[float], int]:
    """The losses, and the number of the body's parameters that this process holds."""
    torch.manual_seed(0)
    body: nn.Module = nn.Sequential(
        nn.Flatten(), nn.Linear(28 * 28, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 32)
    )
    head = nn.Linear(32, 5)
    if dist.is_initialized():
        fully_shard(body, mesh=init_device_mesh("cpu", (PROCESSES,)))
    optimizer = torch.optim.Adam([*body.parameters(), *head.parameters()], lr=1e-3, foreach=False)
    source = fm.data.Glyphs("validation")
    episodes = fm.data.Episodes(source, ways=5, shots=SHOTS, queries=5, tasks=TASKS)
    losses = []
    for step in range(OUTER_STEPS):
        optimizer.zero_grad()
        loss = meta_loss(body, head, fm.distributed.split_tasks(episodes[step]))
        (fm.distributed.task_weight(TASKS) * loss).backward()
        # FSDP has averaged the gradients of the body; the head is outside, and on all ranks.
        losses += fm.distributed.average_gradients(head, [loss.item()])
        optimizer.step()
    held = [p.to_local() if hasattr(p, "to_local") else p for p in body.parameters()]
    return losses, sum(p.numel() for p in held)


def process(rank: int, store: str, expected: list[float], parameters: int) -> None:
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=PROCESSES)
    torch.set_num_threads(1)
    losses, held = train()
    difference = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
    if rank == 0:
        first, last = losses[0], losses[-1]
        print(f"A rank holds {held:,} of the body's {parameters:,} parameters")
        print(f"Loss {first:.4f} to {last:.4f}, differs from one process by {difference:.1e}")
    if not (difference < 1e-5 and held < parameters):
        raise SystemExit(f"{losses} are not the losses of one process, {expected}, or not sharded")
    dist.destroy_process_group()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(process, (f"{folder}/store", *train()), nprocs=PROCESSES)


if __name__ == "__main__":
    main()
