"""Numbers and picture on the first screen of README and home page, from the kept runs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu.machine import ROOT
from benchmarks.peers import picture, results
from benchmarks.peers.contenders import MATRIX, OURS
from benchmarks.peers.tables import digits

# Each document, and where its links to the page of benchmarks lead.
DOCUMENTS = {ROOT / "README.md": "docs/benchmarks.md", ROOT / "docs/index.md": "benchmarks.md"}
BLOCK = "numbers"
PICTURE = "peers-cpu-summary.png"
PICTURED = ("sin5", "omni_mlp")
UNROLLING = ("learn2learn", "higher", "torchopt")


def keep(kept: Path = results.KEPT) -> None:
    """Draws the picture again, and writes the numbers into the documents."""
    report = results.load("cpu", kept)
    if report is None:
        return
    picture.draw(report, kept / PICTURE, PICTURED)
    for document, page in DOCUMENTS.items():
        results.put(document, BLOCK, numbers(page, kept))


def numbers(page: str, kept: Path = results.KEPT) -> str:
    """Three measured numbers as a Markdown list, each with a link into ``page``."""
    small, images = (_workloads(name, kept) for name in ("cpu", "images-cpu"))
    errors = (result["contenders"][OURS]["error"] for result in small.values())
    compiled, compiled_ratio = fastest_peer(small["sin5"])
    looped, looped_ratio = fastest_peer(small["sin5"], UNROLLING)
    conv_peer, conv_ratio = fastest_peer(images["omni_conv5"], UNROLLING)
    mlps, convs = f"({page}#mlps)", f"({page}#networks-of-images)"
    return "\n".join(
        [
            f"- **{max(errors):.1e}**: largest relative error of a float32 meta-gradient or product"
            f" against float64 [on MLPs]{mlps}.",
            f"- **{digits(looped_ratio)} times** the speed of {looped}, and"
            f" {digits(compiled_ratio)} times the fastest of all ({compiled}), on"
            f" [sinusoids, five inner steps]{mlps}.",
            f"- **{digits(conv_ratio)} times** the speed of {conv_peer}, the fastest library that"
            f" unrolls, on [Conv4, five inner steps]{convs}.",
        ]
    )


def fastest_peer(result: Mapping[str, Any], names: Collection[str] = ()) -> tuple[str, float]:
    """Label and ratio of the fastest measured contender that is not fastmeta.

    Args:
        result: a workload of a report.
        names: contenders to choose from; none: all.
    """
    contenders = result["contenders"]
    others = [n for n in contenders if n != MATRIX.name and not n.startswith(OURS)]
    chosen = [contenders[name] for name in others if not names or name in names]
    rows = [row for row in chosen if row["status"] == "measured"]
    best = min(rows, key=lambda row: row["ratio"])
    return best["label"], best["ratio"]


def _workloads(name: str, kept: Path) -> Mapping[str, Any]:
    report = results.load(name, kept)
    if report is None:
        raise FileNotFoundError(f"no kept run {results.json_of(name, kept)}")
    return report["workloads"]
