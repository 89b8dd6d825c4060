"""Small comparisons of learners, and the results by which two of them are compared."""

from __future__ import annotations

import json
from pathlib import Path

from fastmeta.training.checkpoint import load_checkpoint
from fastmeta.training.compare import compare
from fastmeta.training.compare.plan import plan
from fastmeta.training.metrics_log import read_metrics
from tests.helpers.runs import TINY, without_seconds

NAMES = ["maml", "reptile", "fomaml"]


class Killed(BaseException):
    """Raised in place of a signal that kills the process."""


def kill() -> None:
    raise Killed


def sinusoid(out: Path, names=NAMES, own=None, **options):
    return plan(out, "sinusoid", names, own, **{**TINY, **options})


def run(out: Path, names=NAMES, **options):
    return compare(sinusoid(out, names, **options), out, tasks=10)


def record(out: Path) -> dict:
    return json.loads((out / "comparison.json").read_text())


def learners(out: Path) -> dict[str, dict]:
    return {learner["algorithm"]: learner for learner in record(out)["learners"]}


def timeless(out: Path) -> list[dict]:
    """Return the learners' records without times and folders, and the contents of their runs."""
    results = []
    for learner in record(out)["learners"]:
        folder = Path(learner["options"]["out"])
        state = load_checkpoint(folder / "checkpoint.pt")["learner"]
        learner["options"].pop("out"), learner.pop("command")
        learner.pop("seconds"), learner.pop("seconds_per_iteration")
        metrics = without_seconds(read_metrics(folder / "metrics.jsonl"))
        results.append({"record": learner, "metrics": metrics, "state": repr(state)})
    return results
