"""What the site's build does besides: folders in the navigation, and results from their files."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

from benchmarks.peers import picture, tables

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
_RESULTS_OF = re.compile(r"^\{\{ results ([\w-]+) \}\}$", re.MULTILINE)


def on_config(config: Any) -> Any:
    """Puts the pages of a folder, in the order of their names, in the place of the folder."""
    root = Path(config.docs_dir)
    config.nav = [_expanded(root, entry) for entry in config.nav]
    return config


def _expanded(root: Path, entry: dict[str, str]) -> dict[str, Any]:
    ((title, place),) = entry.items()
    if not place.endswith("/"):
        return entry
    pages = sorted(root.glob(f"{place}*.md"), key=lambda page: page.name.lower())
    return {title: [page.relative_to(root).as_posix() for page in pages]}


def on_files(files: Any, config: Any) -> Any:
    """Draws the runs that are kept, beside the learning curves that are."""
    for path in sorted(RESULTS.glob("peers-*.json")):
        files.append(_asset(config, f"{path.stem}.png", _drawn(path)))
    for path in sorted(RESULTS.glob("maml-*.png")):
        files.append(_asset(config, path.name, path.read_bytes()))
    return files


def _asset(config: Any, name: str, content: bytes) -> File:
    return File.generated(config, f"assets/{name}", content=content)


def _drawn(path: Path) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "image.png"
        picture.draw(json.loads(path.read_text()), image)
        return image.read_bytes()


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The table and the picture of a run in the place of ``{{ results NAME }}``."""
    return _RESULTS_OF.sub(lambda found: _table(found[1]), markdown)


def _table(name: str) -> str:
    report = json.loads((RESULTS / f"{name}.json").read_text())
    return tables.markdown(report, f"assets/{name}.png")
