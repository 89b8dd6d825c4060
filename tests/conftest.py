from __future__ import annotations

import os
import sys

import pytest
import torch

import fastmeta as fm

if not fm.build_info()["native"]:
    os.environ["FASTMETA_BACKEND"] = "torch"  # what there is, without a warning in every process

torch.backends.cudnn.allow_tf32 = False  # float32 is compared as IEEE float32

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
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=[pytest.param("cpu", id="emulator")] if EMULATED else DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param
