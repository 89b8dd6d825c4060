"""Outcomes read off the output of a step: counts of tests, sanitizer errors, measurements."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.gpu.runner import Outcome

NOT_AVAILABLE = 3  # exit code of a step of ours that cannot run on this machine
UNSUPPORTED = re.compile(r"Device not supported|not supported on this (?:device|platform|system)")
SUMMARIES = re.compile(
    r"(?:ERROR SUMMARY: (?P<errors>\d+) error"
    r"|RACECHECK SUMMARY: (?P<hazards>\d+) hazards? displayed)"
)


def of_tests(junit: Path) -> Callable[[int, str], Outcome]:
    """Counts and the first failures, from the XML that pytest writes."""

    def read(code: int, output: str) -> Outcome:
        if not junit.exists():
            return Outcome("failed", {"exit_code": code, "reason": "pytest left no results"})
        suite = ElementTree.parse(junit).getroot().find("testsuite")
        counts = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
        bad = [
            f"{case.get('classname')}::{case.get('name')}"
            for case in suite.iter("testcase")
            if case.find("failure") is not None or case.find("error") is not None
        ]
        passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
        good = code == 0 and passed > 0
        summary = {**counts, "passed": passed, "first_failures": bad[:20]}
        return Outcome("passed" if good else "failed", summary)

    return read


def of_sanitizer(code: int, output: str) -> Outcome:
    """Errors counted by compute-sanitizer; it passes only if it ran to its summary."""
    if match := UNSUPPORTED.search(output):
        return Outcome("not available", {"reason": match.group()})
    counts = [int(m["errors"] or m["hazards"] or 0) for m in SUMMARIES.finditer(output)]
    if not counts:
        return Outcome("failed", {"exit_code": code, "reason": "it printed no summary"})
    good = code == 0 and sum(counts) == 0
    return Outcome("passed" if good else "failed", {"exit_code": code, "errors": sum(counts)})


def of_kernels(code: int, output: str) -> Outcome:
    """The last line says how many kernels ran, or why that cannot be seen."""
    last = output.strip().splitlines()[-1] if output.strip() else ""
    status = {0: "passed", NOT_AVAILABLE: "not available"}.get(code, "failed")
    return Outcome(status, {"exit_code": code, "reason": last})


def of_benchmarks(measured: Path) -> Callable[[int, str], Outcome]:
    """The rows written so far, which are there even if the step was stopped."""

    def read(code: int, output: str) -> Outcome:
        content = json.loads(measured.read_text()) if measured.exists() else {"rows": []}
        good = code == 0 and content["rows"]
        return Outcome("passed" if good else "failed", {"exit_code": code, **content})

    return read
