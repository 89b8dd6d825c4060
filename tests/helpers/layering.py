"""Layers of a source tree: its import and include graphs, held against a table of floors.

A graph maps a file to the files of its tree that it imports, as paths from the tree's root. A room
is a folder of the root; a file of the root itself is a room of its own, named by its stem.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path, PurePosixPath

Graph = Mapping[str, Collection[str]]

SOURCES = (".h", ".cpp", ".cuh", ".cu")
_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


def imported_names(path: Path, module: str) -> set[str]:
    """Absolute dotted names that a module imports, also in functions and under TYPE_CHECKING.

    Args:
        path: the module's file.
        module: its dotted name, from which relative imports count.
    """
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def module_files(package: Path) -> dict[str, Path]:
    """Dotted name of every module of a package -> its file."""
    files = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def import_graph(package: Path) -> Graph:
    """Imports between the modules of a package."""
    files = module_files(package)
    graph: dict[str, set[str]] = {}
    for module, path in files.items():
        targets = (_longest_prefix(name, files) for name in imported_names(path, module))
        graph[_within(package, path)] = {_within(package, t) for t in targets if t}
    return graph


def _longest_prefix(name: str, files: Mapping[str, Path]) -> Path | None:
    """File of the module that gives ``name``: the name itself, or the module it is taken from."""
    parts = name.split(".")
    prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((files[prefix] for prefix in prefixes if prefix in files), None)


def include_graph(csrc: Path) -> Graph:
    """Includes between the files of a tree of C++, by their paths from its root."""
    paths = {_within(csrc, path): path for path in source_files(csrc)}
    return {
        name: {header for header in _INCLUDE.findall(path.read_text()) if header in paths}
        for name, path in paths.items()
    }


def source_files(csrc: Path) -> list[Path]:
    return sorted(path for path in csrc.rglob("*") if path.suffix in SOURCES)


def circle(graph: Graph) -> list[str]:
    """Nodes of a circle, the first one again at its end; empty if the graph has none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def folder_graph(graph: Graph) -> Graph:
    """Edges between folders: each file stands for the folder it lies in."""
    folders: dict[str, set[str]] = {}
    for file, targets in graph.items():
        folder = folder_of(file)
        folders.setdefault(folder, set()).update({folder_of(t) for t in targets} - {folder})
    return folders


def folder_of(file: str) -> str:
    return str(PurePosixPath(file).parent)


def room_of(file: str) -> str:
    path = PurePosixPath(file)
    return path.parts[0] if len(path.parts) > 1 else path.stem


def upward(
    graph: Graph, floors: Mapping[str, int], barred: Mapping[str, Collection[str]]
) -> list[str]:
    """Edges that do not go down.

    Args:
        graph: files and what they import.
        floors: the floor of every room. An edge between rooms leads to a lower floor.
        barred: room -> rooms of lower floors that it still may not import.
    """
    return [
        f"{file}: expected imports of lower floors, got {target}"
        for file, target in _edges(graph)
        if (room := room_of(file)) != (other := room_of(target))
        and (floors[other] >= floors[room] or other in barred.get(room, ()))
    ]


def without_floor(graph: Graph, floors: Mapping[str, int]) -> list[str]:
    """Rooms that the table does not name."""
    return sorted({room_of(file) for file in graph} - set(floors))


def _edges(graph: Graph) -> Iterator[tuple[str, str]]:
    for file, targets in sorted(graph.items()):
        for target in sorted(targets):
            yield file, target


def rooms(folder: Path) -> list[str]:
    """Folders of a root, without what Python caches."""
    folders = (path.name for path in folder.iterdir() if path.is_dir())
    return sorted(name for name in folders if name != "__pycache__")


def strays(folder: Path, expected: Collection[str]) -> list[str]:
    """Files of a root besides the expected ones and compiled extensions."""
    files = (path for path in folder.iterdir() if path.is_file() and path.suffix != ".so")
    return sorted(path.name for path in files if path.name not in expected)


def long_files(paths: Iterable[Path], limit: int) -> list[str]:
    """Files with more lines than the limit, and how many they have."""
    lengths = ((path, path.read_text(encoding="utf-8").count("\n")) for path in paths)
    return [f"{path}: {length} lines" for path, length in lengths if length > limit]


def long_functions(paths: Iterable[Path], limit: int) -> list[str]:
    """Python functions with more lines than the limit, from ``def`` on, docstrings not counted."""
    return [
        f"{path}:{node.lineno} {node.name}: {length} lines"
        for path in paths
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := _lines(node) - _docstring_lines(node)) > limit
    ]


def _lines(node: ast.stmt) -> int:
    return node.end_lineno - node.lineno + 1


def _docstring_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    has_docstring = ast.get_docstring(function, clean=False) is not None
    return _lines(function.body[0]) if has_docstring else 0


def imports_of_tests(tests: Path) -> list[str]:
    """Modules below a folder of tests that import a ``test_*.py``."""
    return [
        f"{file}: expected no import of a test, got {target}"
        for file, target in _edges(import_graph(tests))
        if PurePosixPath(target).name.startswith("test_")
    ]


def imports_from(package: Path, barred: str, allowed: Collection[str] = ()) -> list[str]:
    """Imports of modules below the dotted name ``barred`` that are not below an allowed one."""
    return [
        f"{_within(package, path)}: expected no import from {barred}, got {name}"
        for module, path in module_files(package).items()
        for name in sorted(imported_names(path, module))
        if _is_below(name, barred) and not any(_is_below(name, other) for other in allowed)
    ]


def _is_below(name: str, module: str) -> bool:
    return f"{name}.".startswith(f"{module}.")


def _within(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix()
