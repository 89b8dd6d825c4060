"""Checkpoints of a training run, and the random state that they hold."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from fastmeta.training.files import write_atomically

FORMAT = "fastmeta checkpoint 1"


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` (tensors, numbers, strings, and dicts and lists of them) atomically."""
    write_atomically(path, lambda file: torch.save({"format": FORMAT, **state}, file))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a file of :func:`save_checkpoint`, with all tensors on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or not a checkpoint of fastmeta.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is damaged or not a checkpoint: {error}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path} is not a {FORMAT}")
    return state


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """State of the random generators that layers such as dropout use on ``device``."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Restore the state of :func:`rng_state`; generators without a saved state keep theirs."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
