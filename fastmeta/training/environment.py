"""Seed, threads and determinism of a training, restored at its end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from fastmeta.training.config import TrainConfig


@contextmanager
def training_environment(config: TrainConfig) -> Iterator[None]:
    """Set seed, threads and deterministic cuDNN for the run, and restore them afterwards."""
    device, cudnn = torch.device(config.device), torch.backends.cudnn
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        stack.enter_context(cpu_threads(config.threads))
        for flag, value in (("deterministic", True), ("benchmark", False)):
            stack.callback(setattr, cudnn, flag, getattr(cudnn, flag))
            setattr(cudnn, flag, value)
        torch.manual_seed(config.seed)
        yield


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Let PyTorch use ``count`` CPU threads inside; ``None`` changes nothing."""
    if count is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
