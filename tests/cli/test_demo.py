"""The demo: it runs through, times the backends in turn, and says so if there is only one."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from fastmeta.cli import demo
from fastmeta.data import ClassImages
from fastmeta.training import evaluation, sources
from fastmeta.training import timing as _timing


@pytest.fixture
def small_images(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (24, 20, 1, 16, 16), generator=generator, dtype=torch.uint8)
    for module in (demo, sources):
        monkeypatch.setattr(module, "Glyphs", lambda split: ClassImages(images))
    for module in (sources, evaluation):
        monkeypatch.setattr(module, "from_spec", lambda *_, **__: ClassImages(images))


@pytest.fixture
def backends(monkeypatch) -> list[str]:
    """The backends switched to, in turn."""
    used = []

    @contextmanager
    def use_backend(name):
        used.append(name)
        yield

    monkeypatch.setattr(demo, "use_backend", use_backend)
    return used


def test_the_demo_runs_through(tmp_path, capsys, small_images):
    demo.demo(tmp_path, seconds=0.2, tasks=3, rounds=1)
    out = capsys.readouterr().out
    assert "ProtoNet on glyphs, 5-way 1-shot, 3 evaluation tasks: accuracy " in out
    assert "MAML on glyphs, 5-way 1-shot, inner steps 5, 3 evaluation tasks: accuracy " in out
    assert "24 characters to train on" in out
    assert f"learning curves in {tmp_path}/learning_curves.png" in out
    assert (tmp_path / "learning_curves.png").stat().st_size > 1000
    assert ("times as fast" in out) is demo.has_native()


def test_the_demo_can_be_repeated(tmp_path, small_images):
    for _ in range(2):
        demo.demo(tmp_path, seconds=0.01, tasks=2, rounds=1)


def test_maml_trains_at_second_order(tmp_path):
    protonet, maml = demo.configs(tmp_path, 3.0)
    assert (protonet.algorithm, maml.algorithm) == ("protonet", "maml")
    assert not maml.first_order
    assert protonet.time_limit == maml.time_limit == pytest.approx(0.05)


def test_backends_are_timed_in_turn(monkeypatch, backends):
    now = 0.0

    def call():
        nonlocal now
        now += {"native": 0.001, "torch": 0.003}[backends[-1]]

    monkeypatch.setattr(_timing.time, "perf_counter", lambda: now)
    monkeypatch.setattr(demo, "has_native", lambda: True)
    monkeypatch.setattr(demo, "cases", lambda: {"some op": call})
    table = demo.speeds(rounds=2).splitlines()
    assert backends == ["native", "torch"] * 3
    assert " ".join(table[1].split()) == "some op 1.00 3.00 ms 3.0 times as fast"
    assert table[0].index("PyTorch") + len("PyTorch") == table[1].index(" ms")


def test_without_the_compiled_ops_it_says_so(monkeypatch, backends):
    monkeypatch.setattr(demo, "backend_of", lambda op, device, dtype: "torch")
    assert "not built" in demo.speeds(rounds=1)
    assert backends == []


def test_every_case_runs(backends):
    for call in demo.cases().values():
        call()


def test_seconds_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="seconds: expected a finite number above 0, got -1"):
        demo.demo(tmp_path, seconds=-1)
