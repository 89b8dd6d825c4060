"""The layers of the package, of csrc/ and of the tests: imports and includes lead down only."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import layering

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, CSRC, TESTS = ROOT / "fastmeta", ROOT / "csrc", ROOT / "tests"

FLOORS = {
    **{"__init__": 9, "__main__": 8},
    "cli": 7,
    **{"training": 6, "compat": 6},
    "learners": 5,
    "engines": 4,
    **{"rules": 3, "distributed": 3, "heads": 3, "models": 3},
    **{"ops": 2, "data": 2},
    "core": 1,
}
# The inner loop does not know where episodes come from; engines lower the per-step norms of models.
BARRED = {"engines": {"data"}, "rules": {"data", "models"}, "distributed": {"models"}}

CSRC_FLOORS = {
    "library": 6,
    **{"task_conv2d": 5, "python": 5},
    "task_program": 4,
    **dict.fromkeys(("pair_scores", "pair_pool", "nearest"), 3),
    **{"activation": 3, "convolution": 3, "matching_loss": 3, "prototype_loss": 3},
    **dict.fromkeys(("execution", "api", "batch_norm", "inner_update", "linear_head"), 2),
    **dict.fromkeys(("pairwise_distance", "prototypes", "ridge_head", "task_matmul"), 2),
    "common": 1,
}

ROOT_FILES = {"__init__.py", "__main__.py", "py.typed"}
MOST_ROOMS, MOST_LINES, LONGEST_FUNCTION = 14, 500, 60
PYTHON = ("fastmeta", "tests", "tools", "benchmarks", "docs", "examples")


def python_files() -> list[Path]:
    return [path for folder in PYTHON for path in sorted((ROOT / folder).rglob("*.py"))]


# The package


def test_imports_of_the_package_lead_down():
    graph = layering.import_graph(PACKAGE)
    assert layering.without_floor(graph, FLOORS) == []
    assert layering.upward(graph, FLOORS, BARRED) == []


def test_modules_of_the_package_have_no_circle():
    assert layering.circle(layering.import_graph(PACKAGE)) == []


def test_the_root_of_the_package_has_rooms_only():
    assert layering.strays(PACKAGE, ROOT_FILES) == []
    assert len(layering.rooms(PACKAGE)) <= MOST_ROOMS


# csrc/


def test_includes_lead_down():
    graph = layering.include_graph(CSRC)
    assert layering.without_floor(graph, CSRC_FLOORS) == []
    assert layering.upward(graph, CSRC_FLOORS, {}) == []


def test_folders_and_files_of_csrc_have_no_circle():
    graph = layering.include_graph(CSRC)
    assert layering.circle(graph) == []
    assert layering.circle(layering.folder_graph(graph)) == []


# Sizes


def test_no_file_is_too_long():
    files = [*python_files(), *layering.source_files(CSRC)]
    assert layering.long_files(files, MOST_LINES) == []


def test_no_function_is_too_long():
    assert layering.long_functions(python_files(), LONGEST_FUNCTION) == []


# Tests and benchmarks


def test_no_module_imports_a_test():
    assert layering.imports_of_tests(TESTS) == []


def test_helpers_import_neither_tests_nor_benchmarks():
    helpers = layering.imports_from(TESTS, "tests", allowed=["tests.helpers"])
    assert [line for line in helpers if line.startswith("helpers/")] == []
    benchmarks = layering.imports_from(TESTS, "benchmarks")
    assert [line for line in benchmarks if line.startswith("helpers/")] == []


def test_benchmarks_import_helpers_only():
    assert layering.imports_from(ROOT / "benchmarks", "tests", allowed=["tests.helpers"]) == []


# What the checks find in small trees


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / "fastmeta" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root / "fastmeta"


CLEAN = {
    "__init__.py": "from fastmeta.ops import add\n",
    "core/__init__.py": "",
    "core/checks.py": "import torch\n",
    "ops/__init__.py": "from fastmeta.ops.add import add\n",
    "ops/add.py": "from fastmeta.core import checks\n",
    "engines/__init__.py": "",
    "engines/loop.py": "import fastmeta.ops.add\nfrom ..core.checks import check\n",
}

UP = {
    "at the top": "from fastmeta.engines import loop\n",
    "by its package": "import fastmeta.engines\n",
    "of a name in it": "from fastmeta.engines.loop import run\n",
    "relative": "from ..engines import loop\n",
    "in a function": "def f():\n    from fastmeta.engines import loop\n",
    "for types": "if TYPE_CHECKING:\n    from fastmeta.engines import loop\n",
    "of the root": "import fastmeta as fm\n",
    "of a neighbour's floor": "from fastmeta import data\n",
}


def test_a_clean_tree_passes(tmp_path):
    package = tree(tmp_path, CLEAN)
    graph = layering.import_graph(package)
    assert graph["engines/loop.py"] == {"ops/add.py", "core/checks.py"}
    assert layering.without_floor(graph, FLOORS) == layering.upward(graph, FLOORS, BARRED) == []
    assert layering.circle(graph) == layering.strays(package, ROOT_FILES) == []
    assert layering.rooms(package) == ["core", "engines", "ops"]


@pytest.mark.parametrize("form", UP)
def test_an_upward_import_is_found(form, tmp_path):
    planted = {"data/__init__.py": "", "ops/add.py": UP[form]}
    graph = layering.import_graph(tree(tmp_path, {**CLEAN, **planted}))
    (line,) = layering.upward(graph, FLOORS, BARRED)
    assert line.startswith("ops/add.py: expected imports of lower floors, got ")


def test_a_barred_import_is_found(tmp_path):
    planted = {"data/__init__.py": "", "engines/loop.py": "from fastmeta import data\n"}
    graph = layering.import_graph(tree(tmp_path, {**CLEAN, **planted}))
    assert len(layering.upward(graph, FLOORS, BARRED)) == 1
    assert layering.upward(graph, FLOORS, {}) == []


@pytest.mark.parametrize(
    "back",
    [
        "from fastmeta.engines import loop\n",
        "from . import loop\n",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .loop import Loop\n",
        "def f():\n    import fastmeta.engines.loop\n",
    ],
)
def test_a_circle_in_a_room_is_found(back, tmp_path):
    planted = {
        "engines/loop.py": "from fastmeta.engines import passes\n",
        "engines/passes.py": back,
    }
    found = layering.circle(layering.import_graph(tree(tmp_path, {**CLEAN, **planted})))
    assert set(found) == {"engines/loop.py", "engines/passes.py"}


def test_a_module_of_the_root_is_found(tmp_path):
    package = tree(tmp_path, {**CLEAN, "arena.py": "", "py.typed": "", "_C.abi3.so": ""})
    assert layering.strays(package, ROOT_FILES) == ["arena.py"]
    assert layering.without_floor(layering.import_graph(package), FLOORS) == ["arena"]


INCLUDES = {
    "common/check.h": "",
    "common/cpu/gemm.h": '#include "common/check.h"\n',
    "task_program/ops.h": '#include <vector>\n#include "common/cpu/gemm.h"\n',
    "task_program/cpu/worker.h": '#include "task_program/ops.h"\n',
    "library.cpp": '#include "task_program/ops.h"\n',
}


def test_clean_includes_pass(tmp_path):
    graph = layering.include_graph(tree(tmp_path, INCLUDES))
    assert graph["task_program/ops.h"] == {"common/cpu/gemm.h"}
    assert (
        layering.without_floor(graph, CSRC_FLOORS) == layering.upward(graph, CSRC_FLOORS, {}) == []
    )
    assert layering.circle(graph) == layering.circle(layering.folder_graph(graph)) == []


def test_an_upward_include_is_found(tmp_path):
    planted = {"common/check.h": '  # include "task_program/ops.h"\n'}
    graph = layering.include_graph(tree(tmp_path, {**INCLUDES, **planted}))
    (line,) = layering.upward(graph, CSRC_FLOORS, {})
    assert line == "common/check.h: expected imports of lower floors, got task_program/ops.h"
    assert layering.circle(graph)


def test_a_circle_of_folders_without_one_of_files_is_found(tmp_path):
    planted = {"task_program/run.h": '#include "task_program/cpu/worker.h"\n'}
    graph = layering.include_graph(tree(tmp_path, {**INCLUDES, **planted}))
    assert layering.circle(graph) == []
    assert set(layering.circle(layering.folder_graph(graph))) == {
        "task_program",
        "task_program/cpu",
    }


def test_long_files_and_functions_are_found(tmp_path):
    docstring = '    """Repeats itself.\n\n    Often.\n    """\n'
    body = "class C:\n def f(self):\n" + docstring + "    x = 1\n" * 60
    paths = [tree(tmp_path, {"core/long.py": body}) / "core/long.py"]
    assert layering.long_functions(paths, 60) == [f"{paths[0]}:2 f: 61 lines"]
    assert layering.long_functions(paths, 61) == []
    assert layering.long_files(paths, 65) == [f"{paths[0]}: 66 lines"]
    assert layering.long_files(paths, 66) == []


def test_a_test_that_imports_a_test_is_found(tmp_path):
    package = tree(
        tmp_path,
        {
            "test_a.py": "from fastmeta.helpers import shared\n",
            "ops/test_b.py": "from fastmeta.test_a import f\n",
            "ops/near.py": "from fastmeta.ops import test_b\n",
            "helpers/shared.py": "import benchmarks.common.timers\n",
        },
    )
    assert layering.imports_of_tests(package) == [
        "ops/near.py: expected no import of a test, got ops/test_b.py",
        "ops/test_b.py: expected no import of a test, got test_a.py",
    ]
    assert layering.imports_from(package, "benchmarks") == [
        "helpers/shared.py: expected no import from benchmarks, got benchmarks.common.timers"
    ]
    assert layering.imports_from(package, "benchmarks", allowed=["benchmarks.common"]) == []
