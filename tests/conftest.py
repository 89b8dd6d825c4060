from __future__ import annotations

import gc
import os
import zlib

import pytest
import torch

import fastmeta as fm

# Before their import: a failed assertion in them then shows its values.
pytest.register_assert_rewrite("tests.helpers", "tests.cuda_emulation.checks")

from tests.helpers.skips import EMULATED  # noqa: E402
from tools.commit_date import date_of_commit  # noqa: E402

if not fm.build_info()["native"]:
    os.environ["FASTMETA_BACKEND"] = "torch"  # what there is, without a warning in every process

torch.backends.cudnn.allow_tf32 = False  # float32 is compared as IEEE float32

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


DAYS = 4


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip three quarters of the tests marked `rotating`, which are slow.

    The date of the commit chooses the quarter that runs. FASTMETA_ALL_TESTS=1 runs all.
    """
    day = date_of_commit()
    if EMULATED or not day or os.environ.get("FASTMETA_ALL_TESTS") == "1":
        return
    skip = pytest.mark.skip(reason="runs on another day: `make test FULL=1` runs all")
    for item in items:
        other_day = zlib.crc32(f"{item.nodeid} {day}".encode()) % DAYS
        if item.get_closest_marker("rotating") and other_day:
            item.add_marker(skip)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Hide thousands of collected tests from the garbage collector, whose runs they made slow."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=[pytest.param("cpu", id="emulator")] if EMULATED else DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param
