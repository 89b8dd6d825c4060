from __future__ import annotations

import gc
import os

import pytest
import torch

import fastmeta as fm

# Before their import: a failed assertion in them then shows its values.
pytest.register_assert_rewrite("tests.helpers", "tests.cuda_emulation.checks")

from tests.helpers.skips import EMULATED  # noqa: E402

if not fm.build_info()["native"]:
    os.environ["FASTMETA_BACKEND"] = "torch"  # what there is, without a warning in every process

torch.backends.cudnn.allow_tf32 = False  # float32 is compared as IEEE float32

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Hide thousands of collected tests from the garbage collector, whose runs they made slow."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=[pytest.param("cpu", id="emulator")] if EMULATED else DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param
