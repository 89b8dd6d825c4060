"""The documentation: its code runs, its command lines are valid, it is complete, and it builds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastmeta as fm
from tests.helpers.documents import check_command, commands, excerpts, run_python

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
OPTIONAL = ("accelerate", "higher", "learn2learn", "lightning")
OPS = [name for name in fm.ops.__all__ if name not in ("backend_of", "build_info", "use_backend")]
LEARNERS = [name for name in fm.__all__ if name[0].isupper()]


def text_of(page: str) -> str:
    return (DOCS / page).read_text()


@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in text_of(page)])
def test_python_of_a_page_runs_in_order(page, tmp_path, monkeypatch):
    if page == "how-to/read-explain.md" and not fm.build_info()["native"]:
        pytest.skip("it shows task programs, which the native extension has")
    monkeypatch.chdir(tmp_path)
    try:
        run_python(text_of(page), page)
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        pytest.skip(f"{error.name} is not installed")


@pytest.mark.parametrize("page", PAGES)
def test_excerpts_are_what_the_files_say(page):
    for source, excerpt in excerpts(text_of(page)):
        assert excerpt in source.read_text(), f"{source.relative_to(ROOT)} lacks:\n{excerpt}"


def command_lines() -> list:
    return [
        pytest.param(arguments, id=f"{page}: {' '.join(arguments)}")
        for page in PAGES
        for arguments in commands(text_of(page))
    ]


@pytest.mark.parametrize("arguments", command_lines())
def test_command_lines_are_valid(arguments):
    check_command(arguments)


@pytest.mark.parametrize("name", [*OPS, "hvp"])
def test_every_op_has_a_page(name):
    assert f".{name}\n" in text_of(f"ops/{name}.md")


@pytest.mark.parametrize("name", LEARNERS)
def test_every_learner_has_a_page(name):
    assert f".{name}\n" in text_of(f"learners/{name}.md")


slow = pytest.mark.timeout(900)  # the first of them builds the site


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("mkdocstrings_handlers.python", reason="mkdocstrings is not installed")
    pytest.importorskip("material", reason="mkdocs-material is not installed")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@slow
def test_the_navigation_has_every_page(site):
    html = (site / "tour.html").read_text()
    for page in PAGES:
        place = Path(page).with_suffix(".html")
        assert (site / place).exists(), page
        assert page == "tour.md" or f'href="{place}"' in html, page


@slow
def test_the_site_loads_nothing_from_elsewhere(site):
    for page in site.rglob("*.html"):
        html = page.read_text()
        for tag in ('<script src="http', '<link rel="stylesheet" href="http', '<img src="http'):
            assert tag not in html, page


@slow
def test_docstrings_become_sections(site):
    html = (site / "ops" / "prototypes.html").read_text()
    for word in ("Parameters:", "Returns:", "Raises:", "Examples:"):
        assert word in html
    assert "<blockquote>" not in html
