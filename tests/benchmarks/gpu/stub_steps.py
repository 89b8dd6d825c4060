"""Stubs of the steps of ``make gpu``."""

from __future__ import annotations

from benchmarks.gpu import machine
from benchmarks.gpu.runner import Step

PASS, FAIL = "print('fine')", "print('broken'); raise SystemExit(4)"


def stub(name: str, code: str, **options) -> Step:
    given = {"share": 5.0, "output": f"{name}.txt", **options}
    return Step(name, machine.python("-c", code), **given)
