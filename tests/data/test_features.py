"""Stored features as a source of episodes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastmeta.data import Episodes, Features

X = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
Y = torch.arange(12) % 3


def stored(path, kind):
    if kind == "npz":
        np.savez(path / "f.npz", x=X.numpy(), y=Y.numpy())
    elif kind == "safetensors":
        save = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
        save.save_file({"features": X, "labels": Y}, path / "f.safetensors")
    else:
        torch.save({"features": X, "labels": Y}, path / f"f.{kind}")
    return path / f"f.{kind}"


@pytest.mark.parametrize("kind", ["npz", "pt", "pth", "safetensors"])
def test_files_of_each_kind(kind, tmp_path):
    source = Features.load(stored(tmp_path, kind))
    assert torch.equal(source.features, X) and source.class_names == ["0", "1", "2"]
    episode = Episodes(source, ways=3, shots=1, queries=3, tasks=2)[0]
    for task in range(2):
        rows = torch.cat([episode.support_x, episode.query_x], 1)[task]
        assert {tuple(row.tolist()) for row in rows} == {tuple(row.tolist()) for row in X}


def test_labels_may_be_words(tmp_path):
    np.savez(tmp_path / "f.npz", features=X.numpy(), labels=["cat", "dog"] * 6)
    assert Features.load(tmp_path / "f.npz").class_names == ["cat", "dog"]


class Dangerous:
    def __reduce__(self):
        return (print, ("run",))


def test_files_run_no_code(tmp_path, capsys):
    torch.save({"x": X, "y": Dangerous()}, tmp_path / "f.pt")
    np.savez(tmp_path / "f.npz", x=X.numpy(), y=np.array([Dangerous()], dtype=object))
    for name in ("f.pt", "f.npz"):
        with pytest.raises(ValueError, match="features: cannot read"):
            Features.load(tmp_path / name)
    assert capsys.readouterr().out == ""


def test_wrong_files(tmp_path):
    with pytest.raises(ValueError, match=r"expected a file \.npz, .*, got f\.csv"):
        Features.load("f.csv")
    with pytest.raises(FileNotFoundError, match="features: there is no file"):
        Features.load(tmp_path / "f.npz")
    (tmp_path / "f.npz").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="features: cannot read"):
        Features.load(tmp_path / "f.npz")
    np.savez(tmp_path / "f.npz", x=X.numpy())
    with pytest.raises(ValueError, match=r"expected one entry y or labels in .*, got x"):
        Features.load(tmp_path / "f.npz")
    torch.save([X, Y], tmp_path / "f.pt")
    with pytest.raises(ValueError, match="to hold a dict with x and y, got list"):
        Features.load(tmp_path / "f.pt")


def test_wrong_features():
    with pytest.raises(TypeError, match=r"x: expected floating-point features, got torch\.int64"):
        Features(X.long(), Y)
    with pytest.raises(ValueError, match=r"x: expected shape \[M, D\]"):
        Features(X.unsqueeze(2), Y)
    with pytest.raises(ValueError, match="labels: expected 12"):
        Features(X, Y[:3])
    with pytest.raises(ValueError, match="x: expected finite features, row 4 is not"):
        Features(X.index_fill(0, torch.tensor([4]), torch.nan), Y)
