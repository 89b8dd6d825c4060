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
# torch.compile of torch 2.11 knows no sizes that vary, and no None, in what a Function returns.
OLD_DYNAMO = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=[pytest.param("cpu", id="emulator")] if EMULATED else DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param
