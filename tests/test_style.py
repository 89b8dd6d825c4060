"""The words of the sources and documents, and the comments of engines and kernels."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("fastmeta", "csrc", "docs", "examples")
CPP = (".cu", ".cuh", ".cpp", ".h")
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile")
BANNED = re.compile(
    r"\b(that of|those of|goes on|way back|where there (?:is|are)|as it is|alone)\b", re.IGNORECASE
)
COMMENTED = 0.03  # the least share of lines with a comment

# "leave alone" is an idiom, and no "only".
_IDIOM = re.compile(
    r"\b(?:leave|leaves|left|let|leaving)\b(?:\s+[\w`*]+){0,4}\s+alone\b", re.IGNORECASE
)


class Text(NamedTuple):
    """A piece of prose and the line where it begins."""

    line: int
    words: str


def prose_of_python(source: str) -> Iterator[Text]:
    """Docstrings, other string literals and comments."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield Text(node.lineno, node.value)
    comments = [
        (token.start[0], token.string)
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    ]
    yield from _joined(comments)


def comments_of_cpp(source: str) -> Iterator[Text]:
    """Comments of C++ and CUDA, and the string literals beside them."""
    pattern = re.compile(r'//([^\n]*)|/\*(.*?)\*/|"((?:\\.|[^"\\\n])*)"', re.DOTALL)
    found = []
    for match in pattern.finditer(source):
        line = source.count("\n", 0, match.start()) + 1
        found.append((line, next(group for group in match.groups() if group is not None)))
    yield from _joined(found)


def _joined(pieces: list[tuple[int, str]]) -> Iterator[Text]:
    """Comments on neighbouring lines as one text: a phrase may run over the end of a line."""
    start, words, last = 0, "", -1
    for line, piece in pieces:
        if line > last + 1 and words:
            yield Text(start, words)
            words = ""
        start = start if words else line
        words, last = f"{words} {piece.strip('#/ ')}", line
    if words:
        yield Text(start, words)


def prose_of_document(source: str) -> Iterator[Text]:
    """A document without its code blocks, paragraph by paragraph."""
    without = re.sub(
        r"^( *)```.*?^\1```", lambda m: "\n" * m[0].count("\n"), source, flags=re.S | re.M
    )
    line = 1
    for paragraph in re.split(r"(\n\s*\n)", without):
        yield Text(line, paragraph)
        line += paragraph.count("\n")


def banned_words(texts: Iterator[Text]) -> list[str]:
    """Each banned phrase as ``line: phrase``."""
    found = []
    for text in texts:
        words = _IDIOM.sub("", " ".join(text.words.split()))
        found += [f"{text.line}: {match[0]}" for match in BANNED.finditer(words)]
    return found


def files(folder: str, *endings: str) -> list[Path]:
    return sorted(path for path in (ROOT / folder).rglob("*") if path.suffix in endings)


def prose_of(path: Path) -> Iterator[Text]:
    source = path.read_text()
    if path.suffix == ".py":
        return prose_of_python(source)
    return comments_of_cpp(source) if path.suffix in CPP else prose_of_document(source)


def checked(area: str) -> list[Path]:
    """Files of a folder of sources, or the documents."""
    if area == "documents":
        named = [ROOT / name for name in DOCUMENTS]
        return [path for path in named if path.is_file()] + files("docs", ".md")
    return files(area, ".py", *CPP)


def comment_share(paths: list[Path]) -> float:
    """Lines with a comment over lines of code, all files together."""
    counts = [_comment_lines(path) for path in paths]
    return sum(commented for commented, _ in counts) / sum(lines for _, lines in counts)


def _comment_lines(path: Path) -> tuple[int, int]:
    """Lines with a comment and lines in all; blank ones and a header at the top do not count."""
    source = path.read_text()
    lines = [line for line in source.splitlines() if line.strip()]
    if path.suffix == ".py":
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        return len({t.start[0] for t in tokens if t.type == tokenize.COMMENT}), len(lines)
    head = next((n for n, line in enumerate(lines) if not line.startswith("//")), len(lines))
    body = lines[head:]
    return sum("//" in line for line in body), len(body)


@pytest.mark.parametrize("area", [*SOURCES, "documents"])
def test_banned_words(area):
    found = {
        path.relative_to(ROOT).as_posix(): banned_words(prose_of(path)) for path in checked(area)
    }
    assert {path: phrases for path, phrases in found.items() if phrases} == {}


@pytest.mark.parametrize(
    "read, source, expected",
    [
        (
            prose_of_python,
            'def f():\n    """A norm like that of\n    the batch."""',
            ["2: that of"],
        ),
        (prose_of_python, "x = 1  # the head alone", ["1: alone"]),
        (prose_of_python, "# it stays as\n# it is\nx = 1", ["1: as it is"]),
        (
            prose_of_python,
            'raise ValueError("x: expected one where there is none")',
            ["1: where there is"],
        ),
        (prose_of_python, "# parameters are left alone\nalone = 1", []),
        (comments_of_cpp, "int way_back;  // on the way back", ["1: way back"]),
        (comments_of_cpp, "int x;\n/* It goes\n   on */", ["2: goes on"]),
        (comments_of_cpp, "int alone;", []),
        (prose_of_document, "a\n\nThe bits and those\nof CUDA", ["3: those of"]),
        (prose_of_document, "```sh\nls alone\n```\n", []),
    ],
)
def test_planted_words_are_found(read, source, expected):
    assert banned_words(read(source)) == expected


def test_engines_have_comments():
    assert comment_share(files("fastmeta/engines", ".py")) >= COMMENTED


def kernels() -> list[Path]:
    cpu = [
        p for p in files("csrc", ".cpp", ".h") if p.stem.endswith("_cpu") or p.parent.name == "cpu"
    ]
    return [*files("csrc", ".cu", ".cuh"), *cpu]


def test_kernels_have_comments():
    assert comment_share(kernels()) >= COMMENTED


def test_bare_code_has_too_few_comments(tmp_path):
    bare, told = tmp_path / "bare.py", tmp_path / "told.cu"
    bare.write_text("# a reason\n" + "x = 1\n" * 99)
    told.write_text("// what the file is\nint x;\nint y;  // a reason\n")
    assert comment_share([bare]) == pytest.approx(0.01)
    assert comment_share([told]) == pytest.approx(0.5)
