"""A run on disk: JSON, picture and table in one folder, and what of it the README shows."""

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
README = ROOT / "README.md"
NOTHING = "No run on this kind of device is kept yet."
DEVICES = ("cpu", "cuda")


def write_text(path: Path, text: str) -> None:
    """Atomically."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)


def json_of(device: str, folder: Path) -> Path:
    return folder / f"peers-{device}.json"


def save(report: Mapping[str, Any], folder: Path) -> None:
    """The JSON alone, as after every workload of a run."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(json_of(report["device"], folder), report)


def load(device: str, folder: Path) -> dict[str, Any] | None:
    """None where there was no run on that device."""
    path = json_of(device, folder)
    return json.loads(path.read_text()) if path.exists() else None


def render(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draws the picture and writes the Markdown table beside the JSON. Returns their paths."""
    image = json_of(report["device"], folder).with_suffix(".png")
    table = image.with_suffix(".md")
    picture.draw(report, image)
    write_text(table, tables.markdown(report, image.name) + "\n")
    return [image, table]


def shown(device: str, folder: Path = KEPT) -> str:
    """What the README shows for a device."""
    report = load(device, folder)
    if report is None:
        return NOTHING
    image = json_of(device, folder).with_suffix(".png")
    return tables.markdown(report, image.relative_to(ROOT).as_posix())


def between(text: str, device: str) -> re.Match:
    """What a text has between the markers of a device. Raises ValueError if it has none."""
    begin, end = f"<!-- peers {device} -->\n", f"\n<!-- end of peers {device} -->"
    found = re.search(f"(?<={re.escape(begin)}).*?(?={re.escape(end)})", text, re.DOTALL)
    if not found:
        raise ValueError(f"no markers of the peers on {device}")
    return found


def keep(device: str, folder: Path, kept: Path = KEPT, readme: Path = README) -> None:
    """Copies JSON and picture of a run to the kept results, and its table to the README."""
    source = json_of(device, folder)
    for path in (source, source.with_suffix(".png")):
        shutil.copyfile(path, kept / path.name)
    text = readme.read_text()
    place = between(text, device)
    write_text(readme, text[: place.start()] + shown(device, kept) + text[place.end() :])
