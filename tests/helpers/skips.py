"""Reasons to skip a test: a missing extension, the emulator, an old torch, a missing derivative."""

from __future__ import annotations

import sys

import pytest
import torch

import fastmeta as fm

# In the emulator, tensors of the CPU go through the CUDA kernels.
EMULATED = "tests.cuda_emulation.plugin" in sys.modules
OLD_DYNAMO = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)
OLD_DYNAMO_REASON = (
    "torch.compile of torch 2.11 raises an internal error where an autograd.Function takes sizes "
    "that vary, or returns None; torch 2.13 does not"
)
needs_kernels = pytest.mark.skipif(
    not fm.build_info()["native"], reason="the native extension was not built"
)
MODES = ("reverse", "forward", "finite_difference")  # of a Hessian-vector product


def skip_without_forward_derivative(network: str, mode: str, device: str) -> None:
    if (network, mode, device) in {(n, "forward", "cuda") for n in ("gru", "lstm")}:
        pytest.skip("the cells of GRU and LSTM on CUDA have no forward derivative in PyTorch")
