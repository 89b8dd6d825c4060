"""The documents: code runs, commands, links and numbers are right, the site is complete."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastmeta as fm
from benchmarks.peers.results import between
from fastmeta import cli
from tests.helpers.documents import (
    RECORDS,
    blocks,
    check_command,
    commands,
    excerpts,
    record_table,
    run_python,
)

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
OPTIONAL = (
    "accelerate",
    "curvlinops",
    "higher",
    "learn2learn",
    "lightning",
    "peft",
    "scipy",
    "transformers",
)
OPS = [name for name in fm.ops.__all__ if name not in ("backend_of", "build_info", "use_backend")]
LEARNERS = [name for name in fm.__all__ if name[0].isupper()]


DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *(f"docs/{page}" for page in PAGES)]
_BLOCK = re.compile(r"<!-- ([\w -]+) -->\n.*?<!-- end of \1 -->", re.DOTALL)
_MEASURED = re.compile(
    r"[\d.]+ (?:us|ms|MB|MiB)\b|[\d.]+ ±|[\d.]+ times (?:as (?:fast|long)|the speed)"
)
LIMITS = ("512 MiB",)  # constants of the sources, not measured


def text_of(page: str) -> str:
    return (DOCS / page).read_text()


def links(text: str) -> list[str]:
    """Targets of links and pictures within the repository."""
    found = re.findall(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)", text)
    return [target for target in found if "://" not in target]


def paths(text: str) -> list[str]:
    """Files and folders of the repository that a text names."""
    return re.findall(r"`((?:fastmeta|csrc|tests|benchmarks|docs|examples|tools)/[\w./]+)`", text)


def loose_numbers(text: str) -> list[str]:
    """Measured numbers outside of the blocks that tests compare with the kept results."""
    return [n for n in _MEASURED.findall(_BLOCK.sub("", text)) if n not in LIMITS]


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


YAML = [".pre-commit-config.yaml", "CITATION.cff", *sorted(ROOT.glob(".github/**/*.yml"))]


@pytest.mark.parametrize("path", [ROOT / path for path in YAML], ids=lambda path: path.name)
def test_configurations_are_valid_yaml(path):
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    content = yaml.safe_load(path.read_text())
    for run in re.findall(r"run: (\.[\w./]+)$", path.read_text(), re.MULTILINE):
        assert os.access(ROOT / run, os.X_OK)
    if path.name == "CITATION.cff":
        assert content["version"] == fm.__version__
    if path.name == ".pre-commit-config.yaml":
        assert [repository["repo"] for repository in content["repos"]] == ["local"]


def test_code_of_the_home_page_fits_its_width():
    code = [line for block in blocks(text_of("index.md")) for line in block.code.splitlines()]
    assert code and max(map(len, code)) <= 72


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_paths_lead_to_files(document):
    path = ROOT / document
    missing = [place for place in links(path.read_text()) if not (path.parent / place).exists()]
    missing += [place for place in paths(path.read_text()) if not (ROOT / place).exists()]
    assert missing == []


def test_a_wrong_link_or_path_is_found():
    text = "[a](docs/gone.md#x), ![b](c.png), [d](https://e.org), `fastmeta/gone.py`, `csrc/<op>/`"
    assert links(text) == ["docs/gone.md", "c.png"]
    assert paths(text) == ["fastmeta/gone.py"]


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_stands_on_a_page(name):
    shown = [text_of(page) for page in PAGES if f"<!-- record {name} -->" in text_of(page)]
    assert len(shown) == 1
    assert between(shown[0], f"record {name}").group() == record_table(name)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_measured_numbers_stand_in_blocks_held_by_tests(document):
    assert loose_numbers((ROOT / document).read_text()) == []


def test_a_loose_number_is_found():
    held = "<!-- record x -->\n1.2 ± 0.1\n<!-- end of record x -->"
    assert loose_numbers(f"3 ms\n{held}\nat 97.5 ± 0.3 %, 2.1 times as fast") == [
        *("3 ms", "97.5 ±", "2.1 times as fast"),
    ]


@pytest.mark.parametrize("name", [*OPS, "ggnvp", "hvp", "ridge_head"])
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
    pytest.importorskip("ziamath", reason="ziamath is not installed")
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


@slow
def test_formulas_are_typeset_within_the_page(site):
    html = (site / "design.html").read_text()
    assert html.count('<p class="formula"><svg') == 3
    assert 'aria-label="v_K = ' in html and "arithmatex" not in html


@slow
@pytest.mark.parametrize("command", ["train", "eval", "compare", "heads", "info", "demo"])
def test_the_page_of_the_command_line_has_every_option(site, command):
    html = (site / "cli.html").read_text()
    with pytest.raises(SystemExit), contextlib.redirect_stdout(io.StringIO()) as printed:
        cli.main([command, "--help"])
    options = set(re.findall(r"--[a-z][\w-]+", printed.getvalue()))
    assert "--debug" in options and {option for option in options if option not in html} == set()


@slow
def test_the_site_has_the_sources_behind_the_links(site):
    html = (site / "walkthrough.html").read_text()
    targets = set(re.findall(r'href="(source/[\w./]+)"', html))
    assert "source/fastmeta/learners/gradient/maml.py.html" in targets
    assert all((site / target).exists() for target in targets)


@slow
def test_contributing_is_the_text_of_the_repository(site):
    html = (site / "contributing.html").read_text()
    titles = re.findall(r"^## (.*)$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert len(titles) > 5 and all(title in html for title in titles)
