"""The files of a run: atomic writes, checkpoints, and a log that drops what a kill left behind."""

from __future__ import annotations

import os

import pytest
import torch

from fastmeta.training.checkpoint import load_checkpoint, rng_state, save_checkpoint, set_rng_state
from fastmeta.training.files import write_atomically, write_json
from fastmeta.training.metrics_log import MetricsLog, read_metrics


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    state = {"weights": torch.randn(3), "options": {"out": "a", "limit": None}, "betas": [0.9, 1]}
    save_checkpoint(tmp_path / "checkpoint.pt", state)
    loaded = load_checkpoint(tmp_path / "checkpoint.pt")
    assert torch.equal(loaded.pop("weights"), state.pop("weights"))
    assert {name: loaded[name] for name in state} == state


def test_a_crash_while_writing_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"iteration": 1})

    def crash(state, file):
        file.write(b"half a checkp")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(path, {"iteration": 2})
    assert load_checkpoint(path)["iteration"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_the_bytes_are_on_the_disk_before_the_name_moves(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    write_atomically(tmp_path / "file", lambda file: file.write(b"x"))
    assert calls == ["fsync", "replace", "fsync"]


def test_a_write_killed_before_left_its_temporary_file(tmp_path):
    (tmp_path / "file.tmp").write_bytes(b"left over")
    write_atomically(tmp_path / "file", lambda file: file.write(b"x"))
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_json_refuses_what_is_no_json(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "eval.json", {"mean": float("nan")})
    assert not (tmp_path / "eval.json").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 damaged"])
def test_a_damaged_checkpoint_is_named(tmp_path, content):
    (tmp_path / "checkpoint.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint\.pt is damaged"):
        load_checkpoint(tmp_path / "checkpoint.pt")


def test_a_truncated_checkpoint_is_named(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"weights": torch.randn(1000)})
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"checkpoint\.pt is damaged"):
        load_checkpoint(path)


def test_another_torch_file_is_no_checkpoint(tmp_path):
    torch.save({"weights": torch.zeros(1)}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="is not a fastmeta checkpoint"):
        load_checkpoint(tmp_path / "model.pt")


def test_the_random_state_comes_back(device):
    state = rng_state(torch.device(device))
    first = torch.rand(5), torch.rand(5, device=device)
    set_rng_state(state, torch.device(device))
    assert torch.equal(torch.rand(5), first[0])
    assert torch.equal(torch.rand(5, device=device), first[1])


def write_log(path, lines: int) -> None:
    with MetricsLog(path) as log:
        for iteration in range(1, lines + 1):
            log.append({"iteration": iteration, "loss": 1 / iteration})


def test_every_record_is_in_the_file_when_append_returns(tmp_path):
    with MetricsLog(tmp_path / "log") as log:
        log.append({"iteration": 1})
        assert read_metrics(tmp_path / "log") == [{"iteration": 1}]


@pytest.mark.parametrize("torn", ["", '{"iteration": 6, "lo', '{"iteration": 6, "loss": 0.1}\n'])
def test_opening_the_log_keeps_each_iteration_once(tmp_path, torn):
    path = tmp_path / "log"
    write_log(path, 5)
    with open(path, "a") as file:
        file.write(torn)
    with MetricsLog(path, keep=4) as log:
        log.append({"iteration": 5, "loss": 0.5})
    assert [record["iteration"] for record in read_metrics(path)] == [1, 2, 3, 4, 5]
    assert read_metrics(path)[-1]["loss"] == 0.5


def test_a_new_log_begins_empty(tmp_path):
    write_log(tmp_path / "log", 3)
    write_log(tmp_path / "log", 1)
    assert len(read_metrics(tmp_path / "log")) == 1


def test_a_log_that_lacks_iterations_is_named(tmp_path):
    write_log(tmp_path / "log", 3)
    with pytest.raises(ValueError, match="ends at iteration 3, the checkpoint at 5"):
        MetricsLog(tmp_path / "log", keep=5)
    (tmp_path / "log").unlink()
    with pytest.raises(FileNotFoundError):
        MetricsLog(tmp_path / "log", keep=5)


def test_a_log_with_a_gap_is_named(tmp_path):
    (tmp_path / "log").write_text('{"iteration": 1}\n{"iteration": 3}\n')
    with pytest.raises(ValueError, match="line 2: expected iteration 2, got 3"):
        MetricsLog(tmp_path / "log", keep=2)


@pytest.mark.parametrize("line", ["{", "[1]", '{"loss": 1}'])
def test_a_damaged_line_is_named(tmp_path, line):
    (tmp_path / "log").write_text('{"iteration": 1}\n' + line + "\n")
    with pytest.raises(ValueError, match="line 2: not a"):
        read_metrics(tmp_path / "log")


def test_records_hold_finite_numbers(tmp_path):
    with MetricsLog(tmp_path / "log") as log, pytest.raises(ValueError, match="JSON"):
        log.append({"iteration": 1, "loss": float("inf")})
