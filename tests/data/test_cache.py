"""The cache of decoded data: a hit equals the miss, damage is repaired, writers do not collide."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fastmeta.data._cache import _load, _save, cached


def test_a_cache_hit_equals_the_miss_and_builds_nothing(tmp_path: Path) -> None:
    arrays = {"a": np.arange(6).reshape(2, 3), "names": np.array(["x", "yy"])}
    missed = cached("set", {"v": 1}, lambda: arrays, tmp_path)
    hit = cached("set", {"v": 1}, lambda: pytest.fail("built again"), tmp_path)
    for name in arrays:
        np.testing.assert_array_equal(missed[name], hit[name])
    assert len(list(tmp_path.iterdir())) == 1


def test_another_key_is_another_entry(tmp_path: Path) -> None:
    for version in (1, 2):
        made = cached("set", {"v": version}, lambda v=version: {"a": np.array(v)}, tmp_path)
        assert made["a"] == version


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"no archive at all",
        lambda data: data[: len(data) // 2],
        lambda data: data[:200] + bytes([data[200] ^ 1]) + data[201:],
    ],
    ids=["empty", "garbage", "truncated", "flipped bit"],
)
def test_a_damaged_cache_is_rebuilt_with_a_warning(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    arrays = {"a": np.arange(100)}
    cached("set", {}, lambda: arrays, tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    with pytest.warns(UserWarning, match="rebuilding the damaged cache file"):
        rebuilt = cached("set", {}, lambda: arrays, tmp_path)
    np.testing.assert_array_equal(rebuilt["a"], arrays["a"])
    healed = cached("set", {}, lambda: pytest.fail("not healed"), tmp_path)
    np.testing.assert_array_equal(healed["a"], arrays["a"])


def test_an_unwritable_cache_warns_and_gives_the_data(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.warns(UserWarning, match="not cached, cannot write"):
        arrays = cached("set", {}, lambda: {"a": np.array(3)}, blocked)
    assert arrays["a"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_cache_folder_comes_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTMETA_CACHE", str(tmp_path / "deep" / "cache"))
    cached("set", {}, lambda: {"a": np.array(3)})
    assert len(list((tmp_path / "deep" / "cache").glob("set-*.npz"))) == 1


@pytest.mark.rotating
def test_two_writers_never_leave_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    write = (
        "import sys, pathlib, numpy as np\n"
        "from fastmeta.data._cache import _save\n"
        "for _ in range(100): _save(pathlib.Path(sys.argv[1]), {'a': np.full(50_000, 7)})\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    other = subprocess.Popen([sys.executable, "-c", write, str(path)], env=environment)
    loads = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        while other.poll() is None:
            _save(path, {"a": np.full(50_000, 7)})
            arrays = _load(path)
            assert arrays is not None and (arrays["a"] == 7).all()
            loads += 1
    assert other.returncode == 0 and loads > 0
    assert list(tmp_path.iterdir()) == [path]
