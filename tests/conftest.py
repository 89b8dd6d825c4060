from __future__ import annotations

import os

import pytest
import torch

import fastmeta as fm

if not fm.build_info()["native"]:
    os.environ["FASTMETA_BACKEND"] = "torch"  # what there is, without a warning in every process

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param
