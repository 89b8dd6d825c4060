"""Hooks of the site's build: navigation, included files, sources behind links, formulas."""

from __future__ import annotations

import contextlib
import html
import io
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any
from unittest import mock

import ziamath
from mkdocs.structure.files import File

from fastmeta import cli

ROOT = Path(__file__).resolve().parents[2]
RESULTS = "benchmarks/results"
_INCLUDE = re.compile(r"^\{\{ include ([\w./]+) \}\}$", re.MULTILINE)
_HELP = re.compile(r"^\{\{ help (\w+) \}\}$", re.MULTILINE)
_OUTSIDE = re.compile(r"\]\((?:\.\./)+((?:fastmeta|csrc|benchmarks/results)/[\w./-]+)\)")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
_SIZES = {"(": 16.0, "[": 18.0}  # in pixels: within a line, on a line of its own

ziamath.config.svg2 = False  # outlines at their place: symbols would repeat their ids


def on_config(config: Any) -> Any:
    """Replaces a folder in the navigation by its pages, in the order of their names."""
    root = Path(config.docs_dir)
    config.nav = [_expanded(root, entry) for entry in config.nav]
    return config


def _expanded(root: Path, entry: dict[str, Any]) -> dict[str, Any]:
    ((title, place),) = entry.items()
    if isinstance(place, list) or not place.endswith("/"):
        return entry
    pages = sorted(root.glob(f"{place}*.md"), key=lambda page: page.name.lower())
    return {title: [page.relative_to(root).as_posix() for page in pages]}


def on_files(files: Any, config: Any) -> Any:
    """Adds the kept pictures, and a page for each source file that a page links to."""
    for path in sorted((ROOT / RESULTS).glob("*.png")):
        files.append(File.generated(config, f"assets/{path.name}", content=path.read_bytes()))
    texts = (path.read_text() for path in Path(config.docs_dir).rglob("*.md"))
    linked = {place for text in texts for place in _OUTSIDE.findall(text)}
    for place in sorted(place for place in linked if not place.startswith(RESULTS)):
        files.append(File.generated(config, f"source/{place}.md", content=_source_page(place)))
    return files


def _source_page(place: str) -> str:
    language = "python" if place.endswith(".py") else "cpp"
    code = (ROOT / place).read_text()
    return f"---\nsearch: {{exclude: true}}\n---\n\n# {place}\n\n````{language}\n{code}````\n"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Includes files and help texts, and turns links into the repository into links on the site."""
    if page.file.src_uri.startswith("source/"):
        return markdown
    markdown = _INCLUDE.sub(lambda found: _included(found[1]), markdown)
    markdown = _HELP.sub(lambda found: _help(found[1]), markdown)
    folder = str(PurePosixPath(page.file.src_uri).parent)
    return _OUTSIDE.sub(lambda found: f"]({os.path.relpath(_on_site(found[1]), folder)})", markdown)


def _on_site(place: str) -> str:
    """The page or the picture of a file of the repository."""
    if place.startswith(RESULTS):
        return f"assets/{PurePosixPath(place).name}"
    return f"source/{place}.md"


def _included(place: str) -> str:
    """A document at the root of the repository; its links to ``docs/`` start one folder deeper."""
    return (ROOT / place).read_text().replace("](docs/", "](")


def _help(command: str) -> str:
    """What the parser prints for a command."""
    printed = io.StringIO()
    width = {"COLUMNS": "80", "NO_COLOR": "1"}
    with mock.patch.dict(os.environ, width), contextlib.redirect_stdout(printed):
        with contextlib.suppress(SystemExit):
            cli.main([command, "--help"])
    return f"### {command}\n\n```text\n{printed.getvalue()}```\n"


def on_page_content(content: str, **_: Any) -> str:
    """Typesets the formulas as vector graphics, in the colour of the text around them."""
    return _FORMULA.sub(lambda found: _typeset(html.unescape(found[3]), found[2]), content)


def _typeset(formula: str, kind: str) -> str:
    """A formula as an SVG within the page; screen readers get its LaTeX."""
    inline = kind == "("
    drawn = ziamath.Latex(formula, size=_SIZES[kind], color="currentColor", inline=inline)
    style = f' style="vertical-align: {drawn.getyofst():.1f}px"' if inline else ""
    label = html.escape(" ".join(formula.split()), quote=True)
    svg = drawn.svg().replace("<svg ", f'<svg role="img" aria-label="{label}"{style} ', 1)
    return svg if inline else f'<p class="formula">{svg}</p>'
