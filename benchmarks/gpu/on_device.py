"""A pytest plugin that keeps the tests which need a CUDA device.

These are the tests with a parameter "cuda" (the fixture `device` of tests/conftest.py gives it) or
the name of a file that begins so, and tests that without a device are skipped for a reason that
names a "CUDA device".
"""

from __future__ import annotations

import re

import pytest


def needs_cuda(item: pytest.Item) -> bool:
    callspec = getattr(item, "callspec", None)
    values = callspec.params.values() if callspec else ()
    reasons = (mark.kwargs.get("reason", "") for mark in item.iter_markers("skipif"))
    return any(isinstance(v, str) and re.fullmatch(r"cuda(_\w+\.py)?", v) for v in values) or any(
        "CUDA device" in reason for reason in reasons
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.hook.pytest_deselected(items=[item for item in items if not needs_cuda(item)])
    items[:] = [item for item in items if needs_cuda(item)]
