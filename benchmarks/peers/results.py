"""A run on disk: JSON, picture and table in one folder, and its excerpt in the documents."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu.machine import ROOT
from benchmarks.gpu.runner import write_json
from benchmarks.peers import picture, tables

OUT = ROOT / "build" / "peers"
KEPT = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
NOTHING = "No run on this kind of device is kept yet."
DEVICES = ("cpu", "cuda")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)


def json_of(device: str, folder: Path) -> Path:
    return folder / f"peers-{device}.json"


def save(report: Mapping[str, Any], folder: Path) -> None:
    """Write only the JSON, as after every workload of a run."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(json_of(report["device"], folder), report)


def load(device: str, folder: Path) -> dict[str, Any] | None:
    """The report of a run, or None without one."""
    path = json_of(device, folder)
    return json.loads(path.read_text()) if path.exists() else None


def render(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw the picture and write the Markdown table beside the JSON; returns their paths."""
    image = json_of(report["device"], folder).with_suffix(".png")
    table = image.with_suffix(".md")
    picture.draw(report, image)
    write_text(table, tables.markdown(report, image.name) + "\n")
    return [image, table]


def shown(name: str, folder: Path = KEPT) -> str:
    """Markdown of the kept run ``peers-NAME.json`` for the page of benchmarks."""
    report = load(name, folder)
    if report is None:
        return NOTHING
    image = json_of(name, folder).with_suffix(".png")
    return tables.markdown(report, os.path.relpath(image, PAGE.parent))


def between(text: str, name: str) -> re.Match[str]:
    """The part of a document between the markers of a block.

    Raises:
        ValueError: the document has no such markers.
    """
    begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
    match = re.search(f"(?<={re.escape(begin)}).*?(?={re.escape(end)})", text, re.DOTALL)
    if not match:
        raise ValueError(f"text: expected the markers of {name!r}, got none")
    return match


def put(path: Path, name: str, content: str) -> None:
    """Replace the block of that name in a document."""
    text = path.read_text()
    place = between(text, name)
    write_text(path, text[: place.start()] + content + text[place.end() :])


def keep(name: str, folder: Path, kept: Path = KEPT, page: Path = PAGE) -> None:
    """Copy JSON and picture of a run to the kept results, and its table to the page."""
    source = json_of(name, folder)
    for path in (source, source.with_suffix(".png")):
        shutil.copyfile(path, kept / path.name)
    put(page, f"peers {name}", shown(name, kept))
