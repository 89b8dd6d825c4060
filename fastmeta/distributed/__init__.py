"""Training of one learner by several processes: each has a share of the tasks, one all-reduce.

An outer step on every rank::

    loss, logits = learner.meta_loss(*fm.distributed.split_tasks(episode))
    (fm.distributed.task_weight(tasks) * loss).backward()
    fm.distributed.average_gradients(learner)
    optimizer.step()

Without a process group there is one rank with all tasks, and the same lines run unchanged.
"""

from fastmeta.distributed.averaging import (
    average_buffers,
    average_gradients,
    split_tasks,
    task_slice,
    task_weight,
)
from fastmeta.distributed.process_group import launch_id as launch_id
from fastmeta.distributed.process_group import launched as launched
from fastmeta.distributed.process_group import on_rank_zero as on_rank_zero
from fastmeta.distributed.process_group import process_group, rank, world_size
from fastmeta.distributed.process_group import select_device as select_device
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
